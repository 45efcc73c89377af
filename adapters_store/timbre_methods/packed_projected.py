"""A core in a shared basis as C++ reads it best: `Projected` laid out anew where adapters are served from,
with the basis in bfloat16.

Legend: N blocks, I in features, O out features, P and Q sizes of the basis, K places of a sparse core, C rows
of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedBasis:
    """A `Basis`, each side of which is one matrix: the blocks of P one below the other, [N_p P, I], those of
    Q side by side, [O, N_q Q].

    A matrix W lies in panels of C of its rows, pair of columns by pair: ``panels[a, b, c, d]`` is
    ``W[C a + c, 2 b + d]``, or zero where W has no more.
    """

    p_panels: Tensor
    q_panels: Tensor
    p_shape: tuple[int, int, int]
    """Of ``p_NPI``."""
    q_shape: tuple[int, int, int]
    """Of ``q_NOQ``."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedProjected:
    """As `Projected`, field by field. A diagonal core has as many blocks as either side of the basis, but for
    one common block behind vectors ``inner_NI`` or before ``outer_NO``; other cores have one, and no vectors.
    """

    form: Literal["diagonal", "dense", "sparse"]
    core: Tensor
    basis: PackedBasis
    rows_K: Tensor | None = None
    columns_K: Tensor | None = None
    inner_NI: Tensor | None = None
    outer_NO: Tensor | None = None
