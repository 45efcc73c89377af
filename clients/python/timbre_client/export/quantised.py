"""Adapters that were trained over a quantised base and run over the base itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder


def lq_lora(
    folder: str | Path,
    *,
    r: int,
    lora_alpha: float,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]],
) -> Path:
    """LQ-LoRA: by module path, the trained A [r, in] and B [out, r], the split's L1 [out, s] and L2 [s, in].

    L1 and L2 are the pair that training began with, without its scale: ``sqrt(lora_alpha / r)`` times the
    released code's first ``lora_B`` and ``lora_A``.
    """
    keys = ("lora_A.weight", "lora_B.weight", "lq_L1", "lq_L2")
    tensors = {path: dict(zip(keys, arrays, strict=True)) for path, arrays in layers.items()}
    return write_folder(folder, "LQ_LORA", {"r": r, "lora_alpha": lora_alpha}, tensors)
