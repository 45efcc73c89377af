"""A sparse change of a weight as C++ reads it best: `Sparse` laid out anew where adapters are served from.

The layout is SELL-C-σ of Kreutzer et al., "A unified sparse matrix data format for efficient general sparse
matrix-vector multiplication on modern processors with wide SIMD units" (2014), with σ = O.

Legend: O out features, I in features, C outputs of a slice, S slices, K steps of all slices.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

OUTPUTS = 8
"""C"""


@dataclass(frozen=True, slots=True, eq=False)
class SlicedEllpack:
    """``y += S x``. Outputs are in order of how many entries they have, the most first. Eight of them are a
    slice, which has as many steps as its first output has entries. A step is one entry of each output.

    ``ranks_O``: each output's place in that order. ``lengths_S``: steps of each slice. ``columns_KC``: in
    [0, I). All three hold the low 16 bits of their numbers, as int16. ``values_KC``: zero where an output has
    no more entries; float32, or 16 bits if exact. All are contiguous.
    """

    ranks_O: Tensor
    lengths_S: Tensor
    columns_KC: Tensor
    values_KC: Tensor
    in_features: int
