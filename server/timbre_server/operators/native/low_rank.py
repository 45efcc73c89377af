"""`LowRank` in C++: every adapter's factors are read where they lie, once for each few rows.

Legend: T rows of the batch, I in, O out, R ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.library import library, num_threads
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.native.uses import KernelChange, Rows, rows_of
from timbre_server.operators.row_table import RowTable, Segment


class NativeLowRank(LowRankOperator):
    """`LowRankOperator` by ``low_rank.cpp``."""

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return _BoundLowRank([_member(parts_by_slot, table) for parts_by_slot in uses])


class _Use(ctypes.Structure):
    _fields_ = [
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("rank", ctypes.c_int64),
        ("rows", Rows),
    ]


def _member(parts_by_slot: Mapping[int, Sequence[LowRank]], table: RowTable) -> _Member | None:
    found = [
        (segment, part.a_RI.contiguous(), part.b_OR.contiguous())
        for segment in table.segments
        for part in parts_by_slot.get(segment.slot, ())
        if len(part.a_RI)
    ]
    return _Member(found) if found else None


class _Member:
    """The `Kernel` of one member of a group."""

    def __init__(self, uses: Sequence[tuple[Segment, Tensor, Tensor]]) -> None:
        self._held = tuple(uses)
        self.out_features, self._in_features = len(uses[0][2]), uses[0][1].shape[1]
        self._uses = (_Use * len(uses))(
            *(_Use(a.data_ptr(), b.data_ptr(), len(a), Rows.of(segment)) for segment, a, b in uses)
        )
        pairs = sum(len(segment.rows_N) * len(a) for segment, a, _ in uses)
        self._work = pairs * (self._in_features + self.out_features)
        self._run = library().timbre_low_rank

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of([segment for segment, _, _ in self._held])

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        self._run(
            self._uses,
            ctypes.c_int64(len(self._uses)),
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_int64(self._in_features),
            ctypes.c_void_p(y_TO.data_ptr()),
            ctypes.c_int64(self.out_features),
            num_threads(self._work),
        )


class _BoundLowRank(Bound):
    def __init__(self, members: Sequence[_Member | None]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        return [
            () if member is None else (KernelChange(member, x_TI, len(x_TI)),) for member in self._members
        ]
