"""`Diagonal` in C++: gains and shifts are read where an adapter's lie.

Legend: D features (in or out).
"""

from __future__ import annotations

from timbre_methods.program import Diagonal
from timbre_server.operators.contract import Members, Standing, StandingOperator
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.sides import PreparedSides, StandingSides, prepared_sides
from timbre_server.operators.native.uses import Prepared


class NativeDiagonal(StandingOperator[Diagonal, PreparedSides], DiagonalOperator):
    """`DiagonalOperator` by ``diagonal.cpp``."""

    def prepared(self, members: Members[Diagonal]) -> PreparedSides:
        return prepared_sides(members, prepared_gains)

    def standing(self, rows: LiveRows) -> Standing[PreparedSides]:
        return StandingSides("timbre_diagonal", rows)


def prepared_gains(part: Diagonal) -> Prepared:
    """As ``Gains`` of ``diagonal.cpp``."""
    extra_gain_D = part.gain - 1
    shift_D = None if part.shift is None else part.shift.contiguous()
    fields = extra_gain_D.data_ptr(), 0 if shift_D is None else shift_D.data_ptr()
    size = extra_gain_D.shape[0]
    return Prepared(fields, (size, size), size, (extra_gain_D, shift_D))
