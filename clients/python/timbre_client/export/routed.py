"""Mixtures of experts whose papers left no adapter format: LLaVA-MoLE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder

Factors = tuple[ArrayLike, ArrayLike]
"""A [r, in] and B [out, r] of a LoRA."""


@dataclass(frozen=True, slots=True)
class MoleMlp:
    """A router, ``weight`` [E, in] and ``bias`` [E], and the E experts of each projection that has any."""

    weight: ArrayLike
    bias: ArrayLike
    gate: Sequence[Factors] = ()
    up: Sequence[Factors] = ()
    down: Sequence[Factors] = ()


def llava_mole(
    folder: str | Path,
    *,
    r: int,
    lora_alpha: float,
    mode: Literal["sparse", "dense"],
    mlps: Mapping[str, MoleMlp],
    attention: Mapping[str, Factors],
) -> Path:
    """LLaVA-MoLE's language model: MLPs by module path (``model.layers.0.mlp``), and the plain LoRAs of
    attention by theirs. ``mode`` is ``sparse`` in the paper, and ``dense`` in its released script."""
    layers: dict[str, dict[str, ArrayLike]] = {}
    for path, (a, b) in attention.items():
        layers[path] = {"lora_A.weight": a, "lora_B.weight": b}
    for path, mlp in mlps.items():
        layers[path] = {"router.weight": mlp.weight, "router.bias": mlp.bias}
        for name, experts in (("gate", mlp.gate), ("up", mlp.up), ("down", mlp.down)):
            for e, (a, b) in enumerate(experts):
                layers[path] |= {f"moe_{name}.{e}.lora_A": a, f"moe_{name}.{e}.lora_B": b}
    return write_folder(folder, "LLAVA_MOLE", {"r": r, "lora_alpha": lora_alpha, "mode": mode}, layers)
