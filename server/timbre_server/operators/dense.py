"""`Dense`: ``y += Δ x``, for what is exact but has no small form. One product for each adapter.

Legend: T rows, I in, O out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Dense
from timbre_server.operators.by_segment import SumsBySegment
from timbre_server.operators.contract import Bound, Meaning, Operator, Uses
from timbre_server.operators.row_table import RowTable


class DenseOperator(Operator[Dense]):
    part = Dense

    def meaning(self, part: Dense, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=x_TI @ part.delta_OI.T)

    def bind(self, uses: Uses[Dense], table: RowTable) -> Bound:
        return SumsBySegment(lambda part, x_NI: linear(x_NI, part.delta_OI), uses, table)
