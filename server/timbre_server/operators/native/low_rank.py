"""`LowRank` in C++: every adapter's factors are read where they lie, once for each few rows.

Legend: T rows of the batch, I in, O out, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.low_rank import BoundGated, Gating, LowRankOperator
from timbre_server.operators.native.low_rank_experts import BoundExperts
from timbre_server.operators.native.uses import (
    BoundKernels,
    Fields,
    InputKernel,
    low_rank_fields,
    rows_fields,
)
from timbre_server.operators.row_table import RowTable, Segment


class NativeLowRank(LowRankOperator):
    """`LowRankOperator` by ``low_rank.cpp``."""

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return _BoundLowRank([_kernel(parts_by_slot, table) for parts_by_slot in uses])

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        return BoundExperts(uses, table, gating)


class _BoundLowRank(BoundKernels):
    def source(self, x_TI: Tensor) -> Tensor:
        """Factors of bfloat16 meet rows of bfloat16 as they are."""
        return x_TI if x_TI.dtype is torch.bfloat16 else x_TI.float()


def _kernel(parts_by_slot: Mapping[int, Sequence[LowRank]], table: RowTable) -> InputKernel | None:
    held: list[tuple[Segment, tuple[Tensor, Tensor]]] = []
    uses: list[Fields] = []
    work = 0
    for segment in table.segments:
        parts, rows = parts_by_slot.get(segment.slot, ()), rows_fields(segment)
        for a_RI, b_RO in ((part.a_RI.contiguous(), part.b_OR.T.contiguous()) for part in parts):
            if a_RI.shape[0]:
                held.append((segment, (a_RI, b_RO)))
                uses.append(low_rank_fields(a_RI, b_RO, rows))
                work += rows[-1] * a_RI.shape[0]
    if not held:
        return None
    _, (a_RI, b_RO) = held[0]
    shape = b_RO.shape[1], a_RI.shape[1]
    return InputKernel("timbre_low_rank", uses, held, shape, work * sum(shape), is_told_format=True)
