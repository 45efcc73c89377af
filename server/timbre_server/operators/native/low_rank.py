"""`LowRank` in C++: every adapter's factors are read where they lie, once for each few rows.

Legend: I in, O out, R ranks.
"""

from __future__ import annotations

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Uses
from timbre_server.operators.low_rank import BoundGated, Gating, LowRankOperator
from timbre_server.operators.native.input_kernels import InputKernelOperator
from timbre_server.operators.native.low_rank_experts import BoundExperts
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.native.structures import low_rank_fields
from timbre_server.operators.row_table import RowTable


class NativeLowRank(InputKernelOperator[LowRank], LowRankOperator):
    """`LowRankOperator` by ``low_rank.cpp``."""

    kernel, reads_bfloat16 = "timbre_low_rank", True
    joining = "timbre_linear_low_rank"

    def prepared_part(self, part: LowRank) -> Prepared | None:
        if not part.a_RI.shape[0]:
            return None
        a_RI, b_RO = part.a_RI.contiguous(), part.b_OR.T.contiguous()
        shape = b_RO.shape[1], a_RI.shape[1]
        return Prepared(low_rank_fields(a_RI, b_RO), shape, a_RI.shape[0] * sum(shape), (a_RI, b_RO))

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        return BoundExperts(uses, table, gating)
