"""Low-rank adapters that are more than A and B: SoRA, IncreLoRA, Block-LoRA, TLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder


@dataclass(frozen=True, slots=True)
class Gated:
    """``a`` [r', in], ``b`` [out, r'], and the ranks' own factors ``gate`` [r']."""

    a: ArrayLike
    b: ArrayLike
    gate: Sequence[float]


@dataclass(frozen=True, slots=True)
class Rings:
    """TLoRA's cores in order: ``transform`` [n_d, n_d, R, R]; ``out``, ``in_`` [n_d, R, R]; empty: none."""

    transform: Sequence[ArrayLike] = ()
    out: Sequence[ArrayLike] = ()
    in_: Sequence[ArrayLike] = ()


def sora(folder: str | Path, layers: Mapping[str, Gated], *, r: int, lora_alpha: float) -> Path:
    """SoRA: ``r`` is the rank before pruning, which the scale keeps."""
    arrays = {
        path: {"lora_A": layer.a, "lora_B": layer.b, "gate": [list(layer.gate)]}
        for path, layer in layers.items()
    }
    return write_folder(folder, "SORA", {"r": r, "lora_alpha": lora_alpha}, arrays)


def increlora(folder: str | Path, layers: Mapping[str, Gated], *, lora_alpha: float) -> Path:
    """IncreLoRA: the pieces joined in their order, ``gate`` the diagonal E."""
    arrays = {
        path: {"lora_A": layer.a, "lora_B": layer.b, "lora_E": [[value] for value in layer.gate]}
        for path, layer in layers.items()
    }
    return write_folder(folder, "INCRELORA", {"lora_alpha": lora_alpha}, arrays)


def block_lora(
    folder: str | Path, layers: Mapping[str, tuple[ArrayLike, ArrayLike]], *, r: int, lora_alpha: float
) -> Path:
    """Block-LoRA: for each layer the shared block A [r / N, in] and all blocks B [N, out, r / N]."""
    arrays = {path: {"blocklora_A": a, "blocklora_B": b} for path, (a, b) in layers.items()}
    return write_folder(folder, "BLOCK_LORA", {"r": r, "lora_alpha": lora_alpha}, arrays)


def tlora(folder: str | Path, layers: Mapping[str, Rings]) -> Path:
    """TLoRA: an index's first digit runs fastest; digits multiply to the layer's sizes.

    All layers have a transform, or none has, and likewise the residual.
    """
    options = {
        "transform": any(rings.transform for rings in layers.values()),
        "residual": any(rings.out for rings in layers.values()),
    }
    arrays = {
        path: {
            f"tlora_{name}.{d}": core
            for name, cores in (("transform", rings.transform), ("out", rings.out), ("in", rings.in_))
            for d, core in enumerate(cores)
        }
        for path, rings in layers.items()
    }
    return write_folder(folder, "TLORA", options, arrays)
