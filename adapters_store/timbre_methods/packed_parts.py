"""Parts as C++ multiplies by them best, in bfloat16: `Projected` and `Dense` laid out anew where adapters are
served from.

A matrix W [M, K] lies in panels of C of its rows, pair of columns by pair: ``panels[a, b, c, d]`` is
``W[C a + c, 2 b + d]``, or zero where W has no more.

Legend: N blocks, I in features, O out features, P and Q sizes of a basis, K places of a sparse core.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedBasis:
    """A `Basis`, each side of which is one matrix: the blocks of P one below the other, [N_p P, I], those of
    Q side by side, [O, N_q Q]."""

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


@dataclass(frozen=True, slots=True, eq=False)
class PackedDense:
    """``y += Δ x``: as `Dense`, ``delta_OI`` in panels."""

    panels: Tensor
    shape: tuple[int, int]
    """O and I."""
