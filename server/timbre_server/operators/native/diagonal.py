"""`Diagonal` in C++: gains and shifts are read where an adapter's lie.

Legend: D features (in or out).
"""

from __future__ import annotations

from timbre_methods.program import Diagonal
from timbre_server.operators.contract import Members, Standing, StandingOperator
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.low_rank_experts import AdapterGates
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.native.sides import PreparedSides, StandingSides, prepared_sides


class NativeDiagonal(StandingOperator[Diagonal, PreparedSides], DiagonalOperator):
    """`DiagonalOperator` by ``diagonal.cpp``."""

    def prepared(self, members: Members[Diagonal]) -> PreparedSides:
        return prepared_sides(members, prepared_gains)

    def standing(self, rows: LiveRows) -> Standing[PreparedSides]:
        return StandingSides("timbre_diagonal", rows)


def prepared_gains(part: Diagonal, gates: AdapterGates | None = None, column: int = 0) -> Prepared:
    """As ``Gains`` of ``diagonal.cpp``; ``gates``: those of an expert, by the column of its own."""
    extra_gain_D = part.gain - 1
    shift_D = None if part.shift is None else part.shift.contiguous()
    lies = extra_gain_D.data_ptr(), 0 if shift_D is None else shift_D.data_ptr()
    fields = *lies, 0 if gates is None else gates.address, column
    size = extra_gain_D.shape[0]
    return Prepared(fields, (size, size), size, (extra_gain_D, shift_D, gates))
