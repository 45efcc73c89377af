"""`LowRank` in C++: every adapter's factors are read where they lie, once for each few rows.

Legend: T rows of the batch, I in, O out, R ranks.
"""

from __future__ import annotations

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Members, Standing, StandingOperator, Uses
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.low_rank import BoundGated, Gating, LowRankOperator
from timbre_server.operators.native.low_rank_experts import BoundExperts
from timbre_server.operators.native.narrow_inputs import BoundNarrowInputKernels
from timbre_server.operators.native.uses import (
    Prepared,
    PreparedParts,
    Sources,
    low_rank_fields,
)
from timbre_server.operators.row_table import RowTable


class NativeLowRank(StandingOperator[LowRank, PreparedParts], LowRankOperator):
    """`LowRankOperator` by ``low_rank.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[LowRank]) -> PreparedParts:
        return PreparedParts([[_prepared(part) for part in own if part.a_RI.shape[0]] for own in members])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundNarrowInputKernels("timbre_low_rank", rows, self._sources, "timbre_linear_low_rank")

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        return BoundExperts(uses, table, gating)


def _prepared(part: LowRank) -> Prepared:
    a_RI, b_RO = part.a_RI.contiguous(), part.b_OR.T.contiguous()
    shape = b_RO.shape[1], a_RI.shape[1]
    return Prepared(low_rank_fields(a_RI, b_RO), shape, a_RI.shape[0] * sum(shape), (a_RI, b_RO))
