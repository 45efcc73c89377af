"""Adapters that change few weights: of single weights, or of whole input or output channels of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from timbre_client.export.folder import write_folder

Channels = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""By module path: n channels, and the block of differences on them."""


def s2ft(folder: str | Path, *, inputs: Channels | None = None, outputs: Channels | None = None) -> Path:
    """S2FT: ``inputs`` are (n input channels, block [out, n]), ``outputs`` (n output ones, block [n, in]).

    Channels are those of the original model: undo the trainer's permutation first. Blocks are what is added
    to the weight. A layer may be in both. Raises ValueError without a layer.
    """
    layers: dict[str, dict[str, ArrayLike]] = {}
    for side, channels in (("input", inputs), ("output", outputs)):
        for path, (indices, block) in (channels or {}).items():
            layers.setdefault(path, {}).update(
                {f"s2ft_{side}_indices": _int32(indices), f"s2ft_{side}_block": block}
            )
    return write_folder(folder, "S2FT", {}, layers)


Steps = Mapping[str, tuple[ArrayLike, ArrayLike]]
"""By module path: n steps from one place to the next, the first from zero, and n values."""


def composable_sft(folder: str | Path, *, weights: Steps, biases: Steps | None = None) -> Path:
    """Composable SFT: ``index_steps`` and ``values`` of a ``pytorch_diff.bin``, by module path.

    Places run down the columns of a weight [out, in] first (``row + column * out``), as they do in that file.
    Raises ValueError without a layer.
    """
    layers: dict[str, dict[str, ArrayLike]] = {}
    for parameter, steps in (("weight", weights), ("bias", biases)):
        for path, (index_steps, values) in (steps or {}).items():
            layers.setdefault(path, {}).update(
                {f"{parameter}_diff.index_steps": _int32(index_steps), f"{parameter}_diff.values": values}
            )
    return write_folder(folder, "COMPOSABLE_SFT", {}, layers)


def sara(folder: str | Path, *, threshold: float, values: Mapping[str, ArrayLike]) -> Path:
    """SaRA: by module path, the n **new** weights (not differences) where the base's ``|W| < threshold``.

    In row-major order, as ``W[abs(W) < threshold]`` picks them, and of the base in the dtype that is served.
    """
    layers = {path: {"sara_values": new} for path, new in values.items()}
    return write_folder(folder, "SARA", {"threshold": float(threshold)}, layers)


def snell(folder: str | Path, *, threshold: float, points: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Path:
    """SNELL: by module path, ``In_Qs`` [2, in, q/2] and ``Out_Qs`` [2, out, q/2] of the released code.

    ``threshold`` is its ``init_thres``, in [0, 1).
    """
    layers = {path: {"snell_in": of_in, "snell_out": of_out} for path, (of_in, of_out) in points.items()}
    return write_folder(folder, "SNELL", {"threshold": float(threshold)}, layers)


def snella(
    folder: str | Path,
    *,
    thresholds: Mapping[str, float],
    points: Mapping[str, tuple[ArrayLike, ArrayLike]],
    kernels: Mapping[str, tuple[float, float, float]],
) -> Path:
    """SNELLA: by module path, ``init_thres`` in [0, 1), ``In_Qs`` [2, in, q/2] and ``Out_Qs`` [2, out, q/2],
    and ``alpha``, ``gamma`` and ``beta`` of the released code.

    Raises ValueError if the three name different layers.
    """
    if not thresholds.keys() == points.keys() == kernels.keys():
        raise ValueError("found layers of which some are missing, expected the same ones in all three")
    layers: dict[str, dict[str, ArrayLike]] = {}
    for path, (of_in, of_out) in points.items():
        layers[path] = {"snell_in": of_in, "snell_out": of_out}
        for name, value in zip(("alpha", "gamma", "beta"), kernels[path], strict=True):
            layers[path][f"snella_{name}"] = [float(value)]
    return write_folder(folder, "SNELLA", {"thresholds": dict(thresholds)}, layers)


Pair = tuple[ArrayLike, ArrayLike] | tuple[ArrayLike, ArrayLike, ArrayLike]


def spt(
    folder: str | Path,
    *,
    sparse: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    low_rank: Mapping[str, Pair] | None = None,
) -> Path:
    """SPT: by module path, ``sparse`` (n cells ``row * in + column``, n values) and ``low_rank`` (A [r, in],
    B [out, r]) or, for all of them, (A, B, bias [out]).

    The pair has no scale: put one into B. Raises ValueError if only some of the pairs have a bias.
    """
    layers: dict[str, dict[str, ArrayLike]] = {}
    for path, (indices, values) in (sparse or {}).items():
        layers[path] = {"spt_indices": _int32(indices), "spt_values": values}
    lengths = {len(pair) for pair in (low_rank or {}).values()}
    if len(lengths) > 1:
        raise ValueError(
            "found pairs with a bias and pairs without, expected all or none of them to have one"
        )
    for path, pair in (low_rank or {}).items():
        keys = ("spt_lora_A", "spt_lora_B", "spt_lora_bias")
        layers.setdefault(path, {}).update(zip(keys, pair, strict=False))
    return write_folder(folder, "SPT", {"lora_bias": lengths == {3}}, layers)


def _int32(indices: ArrayLike) -> NDArray[np.int32]:
    """Raises ValueError for an index that 32 bits do not hold."""
    wide = np.asarray(indices, dtype=np.int64)
    narrow = wide.astype(np.int32)
    if not np.array_equal(narrow, wide):
        raise ValueError(f"found an index of {int(np.abs(wide).max())}, expected at most {2**31 - 1}")
    return narrow
