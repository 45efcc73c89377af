"""`Routed` in C++, where every expert is of low rank and every router reads the group's own input, as in most
mixtures: what follows from an adapter alone is prepared once, and a table adds where its rows are.

All else is the plain operator's, whose meaning this is.

Legend: T rows of the batch, N rows of one adapter, I in, O out, K gates of one adapter at a group.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_methods.routing import Routed, Router
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.live_rows import LiveRows, rows_fields
from timbre_server.operators.native.low_rank_experts import (
    AdapterExperts,
    ExpertsKernel,
    GatedExperts,
    gate_views,
)
from timbre_server.operators.native.routers import router_fields
from timbre_server.operators.native.uses import BoundKernels, Fields, address_of, structures
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.step_routing import SegmentRouters, StepRouting


class _Prepared:
    """One adapter's mixtures at a group of layers."""

    def __init__(self, members: Members[Routed]) -> None:
        self.members = members
        self.is_served = all(_is_served(part) for own in members for part in own)
        if self.is_served:
            self._lay_out(members)

    def _lay_out(self, members: Members[Routed]) -> None:
        columns: dict[Router, int] = {}
        count = 0
        for router in (own for parts in members for part in parts if (own := part.own_router)):
            if router not in columns:
                columns[router], count = count, count + router.num_experts
        self.routers = tuple(columns)
        self.sizes = tuple(router.num_experts for router in columns)
        self.num_gates = count
        self.share = sum(router.num_kept for router in columns) / count
        self.work = sum(router.weight_EI.numel() for router in columns)
        self.router_fields, self._held = zip(*map(router_fields, columns), strict=True)
        self.first_columns = tuple(columns.values())
        self.experts = [_experts(own, columns) for own in members]


def _is_served(part: Routed) -> bool:
    experts = (inner for expert in part.experts for inner in expert)
    return part.own_router is not None and all(type(inner) is LowRank for inner in experts)


def _experts(parts: Sequence[Routed], columns: Mapping[Router, int]) -> AdapterExperts | None:
    found = [
        (inner, columns[router] + number)
        for part in parts
        if (router := part.own_router) is not None
        for number, expert in enumerate(part.experts)
        for inner in expert
        if isinstance(inner, LowRank) and inner.a_RI.shape[0]
    ]
    return (
        AdapterExperts.of([inner for inner, _ in found], [column for _, column in found]) if found else None
    )


class NativeRouted(StandingOperator[Routed, _Prepared], RoutedOperator):
    """`RoutedOperator` by ``router.cpp`` and ``low_rank.cpp``."""

    def prepared(self, members: Members[Routed]) -> _Prepared:
        return _Prepared(members)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingRouted(self)


class _StandingRouted(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeRouted) -> None:
        self._operator = operator
        self._adapters: dict[int, _Prepared] = {}

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared

    def dismiss(self, slot: int) -> None:
        del self._adapters[slot]

    def bound(self, table: RowTable) -> Bound:
        segments = [segment for segment in table.segments if segment.slot in self._adapters]
        adapters = [self._adapters[segment.slot] for segment in segments]
        if table.is_gated or not all(own.is_served for own in adapters):
            members = {s.slot: own.members for s, own in zip(segments, adapters, strict=True)}
            return RoutedOperator.bind(self._operator, uses_of(members), table)
        return _BoundRouted(self._operator.step, table, list(zip(segments, adapters, strict=True)))


class _BoundRouted(BoundKernels):
    """To one table. Its gates lie where they are written anew at each step."""

    def __init__(
        self, step: StepRouting, table: RowTable, adapters: Sequence[tuple[Segment, _Prepared]]
    ) -> None:
        sizes = [segment.rows_N.shape[0] * own.num_gates for segment, own in adapters]
        self._gates = torch.empty(sum(sizes))
        pieces = self._gates.split_with_sizes(sizes)
        each_NK = [piece.view(-1, own.num_gates) for piece, (_, own) in zip(pieces, adapters, strict=True)]
        self._held, self._views, self._step = adapters, gate_views(each_NK), step
        self._calls = [
            (SegmentRouters(own.routers, own.sizes, table, segment), gates_NK)
            for (segment, own), gates_NK in zip(adapters, each_NK, strict=True)
        ]
        self._uses = self._router_uses(sizes)
        self._begin = address_of(self._uses), sum(len(own.routers) for _, own in adapters)
        self._work = sum(segment.rows_N.shape[0] * own.work for segment, own in adapters)
        self._run = kernel("timbre_gates", ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS)
        super().__init__([self._member(member) for member in range(len(adapters[0][1].experts))])

    def _router_uses(self, sizes: Sequence[int]) -> array[int]:
        """``RouterUse`` of ``router.cpp``."""
        found: list[Fields] = []
        first = 0
        for (segment, own), size in zip(self._held, sizes, strict=True):
            rows = rows_fields(segment)
            for fields, column in zip(own.router_fields, own.first_columns, strict=True):
                found.append((*fields, *rows, first + column, own.num_gates))
            first += size
        return structures(found)

    def _member(self, member: int) -> GatedExperts | None:
        known = enumerate(self._held)
        own = [(x, s, n, each.share) for n, (s, each) in known if (x := each.experts[member]) is not None]
        return GatedExperts(ExpertsKernel(own), self._views, (self._gates,)) if own else None

    def source(self, x_TI: Tensor) -> Tensor:
        """x, after the gates of its rows were computed."""
        x_TI, num_in = x_TI.float(), x_TI.shape[-1]
        self._run(*self._begin, x_TI.data_ptr(), num_in, self._gates.data_ptr(), num_threads(self._work))
        self._step.note(self._calls)
        return x_TI
