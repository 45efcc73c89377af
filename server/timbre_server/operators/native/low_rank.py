"""`LowRank` in C++: every adapter's factors are read where they lie, once for each few rows.

Legend: T rows of the batch, I in, O out, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.low_rank import BoundGated, Gating, LowRankOperator
from timbre_server.operators.native.low_rank_experts import BoundExperts
from timbre_server.operators.native.uses import BoundInputKernels, InputKernel, LowRankUse
from timbre_server.operators.row_table import RowTable


class NativeLowRank(LowRankOperator):
    """`LowRankOperator` by ``low_rank.cpp``."""

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return BoundInputKernels([_kernel(parts_by_slot, table) for parts_by_slot in uses])

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        return BoundExperts(uses, table, gating)


def _kernel(parts_by_slot: Mapping[int, Sequence[LowRank]], table: RowTable) -> InputKernel | None:
    held = [
        (segment, (part.a_RI.contiguous(), part.b_OR.contiguous()))
        for segment in table.segments
        for part in parts_by_slot.get(segment.slot, ())
        if len(part.a_RI)
    ]
    if not held:
        return None
    _, (a_RI, b_OR) = held[0]
    shape = len(b_OR), a_RI.shape[1]
    uses = [LowRankUse.of(a, b, segment) for segment, (a, b) in held]
    work = sum(len(segment.rows_N) * len(a) for segment, (a, _) in held) * sum(shape)
    return InputKernel("timbre_low_rank", uses, held, shape, work)
