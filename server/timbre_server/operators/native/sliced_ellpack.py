"""`SlicedEllpack` in C++: every adapter's matrix is read where it lies, once for as many as 32 of its rows.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.native.uses import (
    BoundKernels,
    Fields,
    InputKernel,
    numbers_fields,
    rows_fields,
)
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.sliced_ellpack import SlicedEllpackOperator


class NativeSlicedEllpack(SlicedEllpackOperator):
    """`SlicedEllpackOperator` by ``sparse.cpp``."""

    def bind(self, uses: Uses[SlicedEllpack], table: RowTable) -> Bound:
        return BoundKernels([_kernel(parts_by_slot, table) for parts_by_slot in uses])


def _kernel(parts_by_slot: Mapping[int, Sequence[SlicedEllpack]], table: RowTable) -> InputKernel | None:
    held = [(segment, part) for segment in table.segments for part in parts_by_slot.get(segment.slot, ())]
    if not held:
        return None
    _, first = held[0]
    uses = [_fields(part, segment) for segment, part in held]
    work = sum(len(segment.rows_N) * part.values_KC.numel() for segment, part in held)
    return InputKernel("timbre_sparse", uses, held, (len(first.ranks_O), first.in_features), work)


def _fields(part: SlicedEllpack, segment: Segment) -> Fields:
    """``SlicesUse`` of ``sparse.cpp``; a part's tensors are contiguous."""
    numbers = part.ranks_O, part.lengths_S, part.columns_KC
    return (
        *(tensor.data_ptr() for tensor in numbers),
        *numbers_fields(part.values_KC),
        *rows_fields(segment),
    )
