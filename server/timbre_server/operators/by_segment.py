"""The plain way to run an operator: each adapter's rows through its own parts, one adapter after the other.

For algebra where one product for each adapter is as good as it gets, and for operators that have no faster
way yet.

Legend: T rows of the batch, N rows of one adapter, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import Tensor

from timbre_methods.program import Part
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.row_table import RowTable, Segment

PartT = TypeVar("PartT", bound=Part)
Apply = Callable[[PartT, Tensor], Tensor]
"""``(part, x_NI) -> change_NO``, both float32, from the input alone."""


class SumsBySegment(Bound, Generic[PartT]):
    """``y[rows] += w · apply(part, x[rows])`` for every segment and each of its parts."""

    def __init__(self, apply: Apply[PartT], uses: Uses[PartT], table: RowTable) -> None:
        self._apply = apply
        self._members: Sequence[Sequence[tuple[Segment, PartT]]] = [
            [(segment, part) for segment in table.segments for part in parts_by_slot.get(segment.slot, ())]
            for parts_by_slot in uses
        ]

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return [[self._change(segment, part, x_TI) for segment, part in own] for own in self._members]

    def _change(self, segment: Segment, part: PartT, x_TI: Tensor) -> Change:
        y_NO = self._apply(part, x_TI[segment.index])
        return Change(y_NO * segment.weights_N.unsqueeze(1), segment.index)
