"""`Sparse` in C++: every adapter's matrix is read where it lies, once for each eight rows.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from timbre_methods.program import Sparse
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.native.uses import BoundKernels, Fields, InputKernel, rows_fields
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.sparse import SparseOperator


class NativeSparse(SparseOperator):
    """`SparseOperator` by ``sparse.cpp``."""

    def bind(self, uses: Uses[Sparse], table: RowTable) -> Bound:
        return BoundKernels([_kernel(parts_by_slot, table) for parts_by_slot in uses])


def _kernel(parts_by_slot: Mapping[int, Sequence[Sparse]], table: RowTable) -> InputKernel | None:
    held = [
        (segment, _laid_out(part))
        for segment in table.segments
        for part in parts_by_slot.get(segment.slot, ())
    ]
    if not held:
        return None
    _, first = held[0]
    uses = [_fields(part, segment) for segment, part in held]
    work = sum(len(segment.rows_N) * len(part.values_N) for segment, part in held)
    return InputKernel("timbre_sparse", uses, held, (len(first.row_ends) - 1, first.in_features), work)


def _fields(part: Sparse, segment: Segment) -> Fields:
    """``SparseUse`` of ``sparse.cpp``."""
    tensors = part.row_ends, part.columns_N, part.values_N
    return *(tensor.data_ptr() for tensor in tensors), *rows_fields(segment)


def _laid_out(part: Sparse) -> Sparse:
    """As the kernel reads it; most often it is."""
    return Sparse(
        part.row_ends.to(torch.int64).contiguous(),
        part.columns_N.to(torch.int32).contiguous(),
        part.values_N.contiguous(),
        part.in_features,
    )
