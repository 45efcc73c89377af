"""Which parts are laid out anew for C++ to multiply by in bfloat16; a shared basis once for all adapters."""

from __future__ import annotations

from functools import partial

from timbre_methods.bases import packed_basis
from timbre_methods.packed_parts import PackedDense, PackedProjected
from timbre_methods.program import Basis, Dense, Projected
from timbre_server.native.panels import in_panels, packed_bytes
from timbre_server.operators.packed_projected import has_whole_sides


def with_packed_basis(part: Projected) -> Projected | PackedProjected:
    """The very same part where C++ cannot run it so, or where its basis would take more memory.

    Raises: as `in_packed_basis`.
    """
    basis = part.basis
    if not has_whole_sides(part) or _packed_bytes(basis) > basis.p_NPI.nbytes + basis.q_NOQ.nbytes:
        return part
    return in_packed_basis(part)


def in_packed_basis(part: Projected) -> PackedProjected:
    """Of a part that `has_whole_sides`. Raises: LibraryUnavailable; InvalidTensors where bfloat16 does not
    hold the basis."""
    basis = packed_basis(part.basis, partial(in_panels, is_rounded=True))
    return PackedProjected(
        part.form, part.core, basis, part.rows_K, part.columns_K, part.inner_NI, part.outer_NO
    )


def packed_dense(part: Dense) -> Dense | PackedDense:
    """The very same part where it would take more memory. Raises: LibraryUnavailable."""
    num_out, num_in = part.delta_OI.shape
    if packed_bytes(num_out, num_in) > part.delta_OI.nbytes:
        return part
    return PackedDense(in_panels(part.delta_OI, is_rounded=True), (num_out, num_in))


def _packed_bytes(basis: Basis) -> int:
    (num_p, p_size, in_features), (num_q, out_features, q_size) = basis.p_NPI.shape, basis.q_NOQ.shape
    return packed_bytes(num_p * p_size, in_features) + packed_bytes(out_features, num_q * q_size)
