"""Adapters that multiply a layer's weight or output: reflections, scales, branches that read the output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder

Arrays = Mapping[str, Mapping[str, ArrayLike]]
"""Arrays by key by module path."""


def ether(
    folder: str | Path,
    layers: Arrays,
    *,
    plus: bool,
    side: Literal["input", "output", "both"],
    input_reading: Literal["block_diagonal", "every_chunk"],
) -> Path:
    """ETHER and, with ``plus``, ETHER+: ``in_u``, ``in_v`` [n, in / n] and ``out_u``, ``out_v`` [n, out / n].

    ``in_`` with a side of input or both, ``out_`` with output or both, ``v`` with ``plus``; of any length.
    ``input_reading`` is ``every_chunk`` for adapters of the authors' code, ``block_diagonal`` for the paper's
    definition; with one block they are the same.
    """
    options = {"plus": plus, "side": side, "input_reading": input_reading}
    return write_folder(folder, "ETHER", options, _prefixed("ether_", layers))


def ssf(folder: str | Path, layers: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Path:
    """SSF: by module path, the scale [out] and the shift [out] after a linear layer."""
    arrays = {path: {"ssf_scale": scale, "ssf_shift": shift} for path, (scale, shift) in layers.items()}
    return write_folder(folder, "SSF", {}, arrays)


def propulsion(folder: str | Path, layers: Mapping[str, ArrayLike], *, degree: int) -> Path:
    """Propulsion: by module path, p [out] before its power is taken; ``degree`` is the power.

    A degree is no part of the authors' checkpoints: it is what the layers were made with, 15 by default.
    """
    arrays = {path: {"propulsion": p} for path, p in layers.items()}
    return write_folder(folder, "PROPULSION", {"degree": degree}, arrays)


def hydra(folder: str | Path, layers: Arrays, *, scale: float = 1.0, branch_biases: bool = False) -> Path:
    """Hydra: a branch on the input and one on the output, each with two factors.

    ``parallel_A`` [p, in], ``parallel_B`` [out, p], ``sequential_A`` [s, out], ``sequential_B`` [out, s];
    with ``branch_biases`` also ``parallel_A_bias`` [p], ``sequential_A_bias`` [s], and
    ``parallel_B_bias`` and ``sequential_B_bias`` [out]. ``scale`` multiplies both branches with their biases.
    """
    options = {"scale": float(scale), "branch_biases": branch_biases}
    return write_folder(folder, "HYDRA", options, _prefixed("hydra_", layers))


def _prefixed(prefix: str, layers: Arrays) -> dict[str, dict[str, ArrayLike]]:
    return {path: {prefix + key: value for key, value in arrays.items()} for path, arrays in layers.items()}
