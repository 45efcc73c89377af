"""Experts of low rank in C++: each is read for those rows alone that a router sends to it.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks, K gates of one adapter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Change, Uses
from timbre_server.operators.live_rows import rows_fields
from timbre_server.operators.low_rank import BoundGated, Gating
from timbre_server.operators.native.uses import (
    Fields,
    KernelChange,
    address_of,
    low_rank_fields,
    rows_of,
    structures,
)
from timbre_server.operators.row_table import RowTable, Segment


@dataclass(frozen=True, slots=True, eq=False)
class _Expert:
    adapter: int
    """Which of the segments that have experts."""
    segment: Segment
    column: int
    a_RI: Tensor
    b_RO: Tensor


class BoundExperts(BoundGated):
    """All experts of low rank at a group. The ranks of one part have one gate."""

    def __init__(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> None:
        self._segments = [s for s in table.segments if any(s.slot in parts_by_slot for parts_by_slot in uses)]
        experts: list[list[_Expert]] = [[] for _ in uses]
        for adapter, segment in enumerate(self._segments):
            rank, columns = 0, gating.columns[segment.slot]
            for own, parts_by_slot in zip(experts, uses, strict=True):
                for part in parts_by_slot.get(segment.slot, ()):
                    if part.a_RI.shape[0]:
                        factors = part.a_RI.contiguous(), part.b_OR.T.contiguous()
                        own.append(_Expert(adapter, segment, columns[rank], *factors))
                        rank += part.a_RI.shape[0]
        rows = [rows_fields(segment) for segment in self._segments]
        self._members = [_Member(own, rows, gating) if own else None for own in experts]

    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        each_NK = [gates(segment.slot).contiguous() for segment in self._segments]
        views = structures([(gates_NK.data_ptr(), gates_NK.shape[1]) for gates_NK in each_NK])
        of_step = _Gates(each_NK, views)
        return [
            () if member is None else (KernelChange(_Gated(member, of_step), x_TI, len(x_TI)),)
            for member in self._members
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Gates:
    """Of one step, by adapter."""

    held: Sequence[Tensor]
    views: array[int]
    """``Gates`` of ``low_rank.cpp``."""


class _Member:
    """The experts of one member of a group."""

    def __init__(self, experts: Sequence[_Expert], rows: Sequence[Fields], gating: Gating) -> None:
        """``rows``: by adapter."""
        self._held = tuple(experts)
        self.out_features, self._in_features = experts[0].b_RO.shape[1], experts[0].a_RI.shape[1]
        self._experts = structures(  # ``Expert`` of ``low_rank.cpp``.
            [(*low_rank_fields(e.a_RI, e.b_RO), *rows[e.adapter], e.adapter, e.column) for e in experts]
        )
        segments = {e.segment.slot: e.segment for e in experts}
        kept = {slot: gating.num_kept[slot] / gating.num_columns[slot] for slot in segments}
        pairs = sum(rows[e.adapter][-1] * e.a_RI.shape[0] * kept[e.segment.slot] for e in experts)
        self._work = int(pairs) * (self._in_features + self.out_features)
        self._begin = (address_of(self._experts), len(experts))
        self._run = kernel(
            "timbre_low_rank_experts", ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER, ADDRESS, NUMBER
        )
        self.rows_N = rows_of(segments.values())

    def add(self, gates: _Gates, x_TI: Tensor, y_TO: Tensor) -> None:
        self._run(
            *self._begin,
            address_of(gates.views),
            x_TI.data_ptr(),
            self._in_features,
            y_TO.data_ptr(),
            self.out_features,
            num_threads(self._work),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Gated:
    """The `Kernel` of one member in one step."""

    member: _Member
    gates: _Gates

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.member.rows_N

    @property
    def out_features(self) -> int:
        return self.member.out_features

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        self.member.add(self.gates, source, y_TO)
