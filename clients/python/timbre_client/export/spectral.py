"""Adapters of small cores in cosine, Hartley and wavelet bases: sDCTFT (MaCP), LoCA and WaRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder


@dataclass(frozen=True)
class Coefficients:
    """One layer of sDCTFT: ``values`` [K] at ``rows`` [K] and ``columns`` [K] of S, whole numbers."""

    values: ArrayLike
    rows: ArrayLike
    columns: ArrayLike


def sdctft(
    folder: str | Path,
    layers: Mapping[str, Coefficients],
    *,
    scale: float,
    transform: Literal["dct2-ortho", "dct2-raw", "hartley"] = "dct2-ortho",
    transpose: bool = False,
) -> Path:
    """``ΔW = scale · T_outᵀ S T_in``, S [out, in]; or its transpose, with S [in, out]."""
    arrays = {
        path: {
            "sdctft_coefficients": np.asarray(layer.values, np.float32),
            "sdctft_indices": np.stack([_whole(layer.rows), _whole(layer.columns)]),
        }
        for path, layer in layers.items()
    }
    return write_folder(
        folder, "SDCTFT", {"transform": transform, "scale": scale, "transpose": transpose}, arrays
    )


@dataclass(frozen=True)
class Located:
    """One layer of LoCA: ``spectrum`` [K] and ``locations`` [2, K] for rows and columns, as trained: floats
    whose type is kept, since it says what they round to."""

    spectrum: ArrayLike
    locations: ArrayLike


def loca(folder: str | Path, layers: Mapping[str, Located], *, scale: float) -> Path:
    """``ΔW = scale · C_outᵀ S C_in`` for each layer. numpy has no bfloat16: such locations must be turned to
    whole numbers by who trained them, and written as sDCTFT's with ``transform="dct2-ortho"``."""
    arrays = {
        path: {"spectrum": np.asarray(layer.spectrum, np.float32), "spectrum_indices": layer.locations}
        for path, layer in layers.items()
    }
    return write_folder(folder, "LOCA", {"scale": scale}, arrays)


def wara(
    folder: str | Path,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    rank: int,
    scale: float,
    wavelet: str = "db1",
) -> Path:
    """``ΔW = scale · G_outᵀ (I₂ ⊗ B A) G_in`` over features, from A [r, in / 2] and B [out / 2, r]."""
    arrays = {path: {"wara_A": a, "wara_B": b} for path, (a, b) in layers.items()}
    return write_folder(folder, "WARA", {"r": rank, "scale": scale, "wavelet": wavelet}, arrays)


def _whole(index: ArrayLike) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    array = np.asarray(index)
    if array.dtype.kind not in "iu":
        raise ValueError(f"places are whole numbers, found {array.dtype}")
    return array.astype(np.int32)
