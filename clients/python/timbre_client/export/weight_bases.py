"""Adapters whose basis comes from the base's own weight: its singular vectors, or its LDU factors.

Shapes below are those of one layer with a weight [out, in]; k is the smaller of the two. Singular vectors are
those that the adapter was trained with, and not computed again: their signs matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder

Latent = Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]
"""By module path: A [r, in], B [out, r] and the core R [r, r]."""


def lora_xs(folder: str | Path, *, alpha: float, layers: Latent, rslora: bool = False) -> Path:
    """LoRA-XS: ``s B R A x`` is added, with ``s = alpha / r``, or ``alpha / sqrt(r)`` with ``rslora``.

    Raises ValueError for layers of different ranks, and without a layer.
    """
    return _latent(folder, "LORA_XS", alpha, layers, rslora)


def lora_sb(folder: str | Path, *, alpha: float, layers: Latent, rslora: bool = False) -> Path:
    """LoRA-SB: as `lora_xs`; A and B come from gradients, and R is the whole of it, its start included."""
    return _latent(folder, "LORA_SB", alpha, layers, rslora)


def _latent(folder: str | Path, method: str, alpha: float, layers: Latent, rslora: bool) -> Path:
    ranks = {len(np.asarray(core)) for _, _, core in layers.values()}
    if len(ranks) > 1:
        raise ValueError(f"all layers have one rank, found {sorted(ranks)}")
    options = {"lora_alpha": float(alpha), "r": next(iter(ranks), 1), "use_rslora": rslora}
    keys = ("lora_A.weight", "lora_B.weight", "default_lora_latent_mapping.weight")
    named = {path: dict(zip(keys, arrays, strict=True)) for path, arrays in layers.items()}
    return write_folder(folder, method, options, named)


def svfit(folder: str | Path, *, sigma: Mapping[str, ArrayLike]) -> Path:
    """SVFit: by module path, the **new** first r singular values [r], not their differences."""
    return write_folder(folder, "SVFIT", {}, {path: {"svfit_sigma": new} for path, new in sigma.items()})


@dataclass(frozen=True, slots=True, eq=False)
class SvftLayer:
    """``s`` [n]; ``gate`` before its sigmoid; ``rows``, ``columns`` [n]; ``u`` [out, k], ``v`` [k, in].

    Rows and columns may be left out for the plain pattern, whose n is k, and then u and v too.
    """

    s: ArrayLike
    gate: float
    rows: ArrayLike | None = None
    columns: ArrayLike | None = None
    u: ArrayLike | None = None
    v: ArrayLike | None = None


def svft(folder: str | Path, *, layers: Mapping[str, SvftLayer]) -> Path:
    """SVFT of the full rank: ``sigmoid(gate) u M v x`` is added, with ``M[rows, columns] += s``."""
    named: dict[str, dict[str, ArrayLike]] = {}
    for path, layer in layers.items():
        arrays = {"s": layer.s, "gate": np.array([layer.gate]), "u": layer.u, "v": layer.v}
        for key, places in (("s_row", layer.rows), ("s_col", layer.columns)):
            arrays[key] = None if places is None else np.asarray(places, np.int64)
        named[path] = {f"svft_layer.{key}": value for key, value in arrays.items() if value is not None}
    return write_folder(folder, "SVFT", {}, named)


@dataclass(frozen=True, slots=True, eq=False)
class SaltLayer:
    """``u`` [out, k], ``s`` [k], ``vt`` [k, in] of the weight; ``scale`` and ``shift`` [r]; ``x`` [k - r, l]
    and ``y`` [l, k - r], None where r is k."""

    u: ArrayLike
    s: ArrayLike
    vt: ArrayLike
    scale: ArrayLike
    shift: ArrayLike
    x: ArrayLike | None = None
    y: ArrayLike | None = None


def salt(folder: str | Path, *, layers: Mapping[str, SaltLayer]) -> Path:
    """SALT: U, S and Vt that it was trained with, and the trained arrays; the server applies the ReLU."""
    named = {}
    for path, layer in layers.items():
        arrays = {
            "U": layer.u,
            "S": layer.s,
            "Vt": layer.vt,
            "trainable_scale_A": layer.scale,
            "trainable_shift_B": layer.shift,
            "trainable_X": layer.x,
            "trainable_Y": layer.y,
        }
        named[path] = {key: value for key, value in arrays.items() if value is not None}
    return write_folder(folder, "SALT", {}, named)


@dataclass(frozen=True, slots=True, eq=False)
class LolduLayer:
    """``z`` [r] and ``scale`` as trained; ``start`` [r], the z that was taken off the base, None for D."""

    z: ArrayLike
    scale: float
    start: ArrayLike | None = None


def loldu(
    folder: str | Path, *, alpha: float, layers: Mapping[str, LolduLayer], init_method: str = "lu"
) -> Path:
    """LoLDU: ``P L_r diag(scale z - alpha / r start) U_r x`` is added, in the LDU factors of the weight.

    ``get_loldu_state_dict`` of the released code keeps z alone; ``scaling_factor`` is in the model's own
    state dict. Without training of it the scale is alpha / r.
    """
    named = {}
    for path, layer in layers.items():
        arrays = {"vector_z": layer.z, "scaling_factor": np.array([layer.scale])}
        named[path] = arrays if layer.start is None else {**arrays, "vector_z_start": layer.start}
    options = {"init_method": init_method, "lora_alpha": float(alpha)}
    return write_folder(folder, "LOLDU", options, named)
