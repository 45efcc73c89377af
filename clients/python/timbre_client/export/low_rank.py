"""Low-rank adapters whose factors are put together from less: NOLA, MoS, LoRTA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder


@dataclass(frozen=True, slots=True)
class Combination:
    """One factor of NOLA: its frozen ``start`` [r, in] or [out, r], ``coefficients`` [k] and the ``seed``."""

    start: ArrayLike
    coefficients: ArrayLike
    seed: int


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRTA's factors: ``a`` [out, r], ``b`` [r, in / heads], ``heads`` [heads, r], ``layers`` [L, r] and
    ``matrices`` [M, r]."""

    a: ArrayLike
    b: ArrayLike
    heads: ArrayLike
    layers: ArrayLike
    matrices: ArrayLike


def nola(
    folder: str | Path,
    layers: Mapping[str, tuple[Combination, Combination]],
    *,
    r: int,
    lora_alpha: float,
    normalised: bool,
) -> Path:
    """NOLA: A and B of each layer, whose random matrices were drawn on a CPU in float32. All A have the same
    number of coefficients, and so have all B."""
    arrays = {
        path: {
            f"{factor}.{key}": value
            for factor, of in zip(("lora_A", "lora_B"), pair, strict=True)
            for key, value in (
                ("weight", of.start),
                ("coefficients", of.coefficients),
                ("seed", np.asarray([of.seed], dtype=np.int64)),
            )
        }
        for path, pair in layers.items()
    }
    a, b = next(iter(layers.values())) if layers else (Combination([], [], 0),) * 2
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "num_basis_A": np.size(np.asarray(a.coefficients)),
        "num_basis_B": np.size(np.asarray(b.coefficients)),
        "normalised": normalised,
        "drawn_on": "cpu",
    }
    return write_folder(folder, "NOLA", options, arrays)


def mos(
    folder: str | Path,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike]],
    pools: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    lora_alpha: float,
) -> Path:
    """MoS: for each layer the places [r, l] of A's and of B's shards; by kind of layer (``q_proj``) the pools
    [size, in / l] and [size, out / l]."""
    arrays = {
        path: {
            "mos_indices_A": np.asarray(a, dtype=np.int32),
            "mos_indices_B": np.asarray(b, dtype=np.int32),
        }
        for path, (a, b) in layers.items()
    }
    first = next(iter(arrays.values()), {"mos_indices_A": np.zeros((0, 0), dtype=np.int32)})
    r, shards = first["mos_indices_A"].shape
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "shards": shards,
        "pool_sizes": {kind: len(np.asarray(a)) for kind, (a, _) in pools.items()},
    }
    whole: dict[str, ArrayLike] = {}
    for kind, (a, b) in pools.items():
        whole[f"mos_pool_A.{kind}"], whole[f"mos_pool_B.{kind}"] = a, b
    return write_folder(folder, "MOS", options, arrays, whole)


def lorta(
    folder: str | Path, factors: Factors, layers: Mapping[str, tuple[int, int]], *, lora_alpha: float
) -> Path:
    """LoRTA: for each layer's path its rows in ``factors.layers`` and in ``factors.matrices``."""
    of_layers, of_matrices = (np.asarray(rows, float) for rows in (factors.layers, factors.matrices))
    arrays = {
        path: {"lorta_c": of_layers[layer] * of_matrices[matrix]} for path, (layer, matrix) in layers.items()
    }
    num_heads, r = np.shape(np.asarray(factors.heads))
    options = {"r": r, "lora_alpha": lora_alpha, "num_heads": num_heads}
    whole = {"lorta_A": factors.a, "lorta_B": factors.b, "lorta_C_h": factors.heads}
    return write_folder(folder, "LORTA", options, arrays, whole)
