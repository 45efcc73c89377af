"""Which cores in shared bases are laid out anew for C++; a basis is packed once for all adapters."""

from __future__ import annotations

from functools import partial

from timbre_methods.bases import packed_basis
from timbre_methods.packed_projected import PackedProjected
from timbre_methods.program import Basis, Projected
from timbre_server.native.panels import in_panels, panel_size
from timbre_server.operators.packed_projected import has_whole_sides


def with_packed_basis(part: Projected) -> Projected | PackedProjected:
    """The very same part where C++ cannot run it so, or where its basis would take more memory.

    Raises: LibraryUnavailable.
    """
    basis = part.basis
    if not has_whole_sides(part) or _packed_bytes(basis) > basis.p_NPI.nbytes + basis.q_NOQ.nbytes:
        return part
    return in_packed_basis(part)


def in_packed_basis(part: Projected) -> PackedProjected:
    """Of a part that `has_whole_sides`. Raises: LibraryUnavailable."""
    basis = packed_basis(part.basis, partial(in_panels, is_rounded=True))
    return PackedProjected(
        part.form, part.core, basis, part.rows_K, part.columns_K, part.inner_NI, part.outer_NO
    )


def _packed_bytes(basis: Basis) -> int:
    (num_p, p_size, in_features), (num_q, out_features, q_size) = basis.p_NPI.shape, basis.q_NOQ.shape
    panel = panel_size()
    sides = (num_p * p_size, in_features), (out_features, num_q * q_size)
    return sum(2 * (rows + -rows % panel) * (columns + columns % 2) for rows, columns in sides)
