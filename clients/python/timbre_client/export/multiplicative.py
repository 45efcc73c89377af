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


def _prefixed(prefix: str, layers: Arrays) -> dict[str, dict[str, ArrayLike]]:
    return {path: {prefix + key: value for key, value in arrays.items()} for path, arrays in layers.items()}
