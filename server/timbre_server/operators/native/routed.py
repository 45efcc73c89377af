"""`Routed` in C++, where every expert is of low rank and every router reads the group's own input, as in most
mixtures. All else is the plain operator's, whose meaning this is.

Legend: T rows of the batch, N rows of one adapter, I in, K gates of one adapter at a group.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_methods.routing import Routed, Router
from timbre_server.operators.contract import (
    Bound,
    Members,
    Operator,
    Standing,
    StandingOperator,
    uses_of,
)
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.low_rank_experts import KERNEL, Experts, prepared_experts
from timbre_server.operators.native.routers import AdapterRouters, write_gates
from timbre_server.operators.native.uses import (
    BoundInputKernels,
    Sources,
    Uses,
    address_of,
)
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.router import Routers
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.step_routing import (
    LastingRouters,
    RouterCall,
    SegmentRouters,
    StepRouting,
)


class _Served:
    """One adapter's mixtures at a group of layers, as the kernels take them."""

    def __init__(self, members: Members[Routed]) -> None:
        own = (router for parts in members for part in parts if (router := part.own_router) is not None)
        self.routers = AdapterRouters(list(dict.fromkeys(own)))
        each, sizes = self.routers.routers, self.routers.sizes
        columns = dict(zip(each, accumulate(sizes, initial=0), strict=False))
        share = sum(router.num_kept for router in each) / sum(sizes)
        experts = [_experts(parts, columns) for parts in members]
        self.experts = prepared_experts(experts, self.routers.gates, share)
        self.max_experts = max(sizes)


_Prepared = _Served | Members[Routed]


def _is_served(part: Routed) -> bool:
    experts = (inner for expert in part.experts for inner in expert)
    return part.own_router is not None and all(type(inner) is LowRank for inner in experts)


def _experts(parts: Sequence[Routed], columns: Mapping[Router, int]) -> Experts:
    return [
        (inner, columns[router] + number)
        for part in parts
        if (router := part.own_router) is not None
        for number, expert in enumerate(part.experts)
        for inner in expert
        if isinstance(inner, LowRank) and inner.a_RI.shape[0]
    ]


class NativeRouted(StandingOperator[Routed, _Prepared], RoutedOperator):
    """`RoutedOperator` by ``router.cpp`` and ``low_rank.cpp``."""

    def __init__(self, inner: Sequence[Operator[Any]], step: StepRouting, routers: type[Routers]) -> None:
        super().__init__(inner, step, routers)
        self.sources = Sources()

    def prepared(self, members: Members[Routed]) -> _Prepared:
        return _Served(members) if all(_is_served(part) for own in members for part in own) else members

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingRouted(self, rows)


class _StandingRouted(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeRouted, rows: LiveRows) -> None:
        self._operator = operator
        self._served = _BoundRouted(operator.step, rows, operator.sources)
        self._others: dict[int, Members[Routed]] = {}

    def admit(self, slot: int, prepared: _Prepared) -> None:
        if isinstance(prepared, _Served):
            self._served.admit_mixture(slot, prepared)
        else:
            self._others[slot] = prepared

    def dismiss(self, slot: int) -> None:
        if self._others.pop(slot, None) is None:
            self._served.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        others = {slot: self._others[slot] for slot in table.slots if slot in self._others}
        is_served = self._served.begin(table)
        if not others:
            return self._served
        plain = RoutedOperator.bind(self._operator, uses_of(others), table)
        return JoinedSums([self._served, plain]) if is_served else plain


class _BoundRouted(BoundInputKernels, LastingRouters):
    """Experts' kernels, and the routers whose gates they read."""

    def __init__(self, step: StepRouting, rows: LiveRows, sources: Sources) -> None:
        super().__init__(KERNEL, rows, sources, is_told_format=True)
        self._step = step
        self._mixtures: dict[int, _Served] = {}
        self._routers = Uses(rows)
        self._called = array("q", [step.clock, 0])  # ``Called`` of ``router.cpp``.
        self._table: RowTable | None = None
        step.follow(self)

    def admit_mixture(self, slot: int, mixture: _Served) -> None:
        mixture.routers.gates.count_at(self._step.acted(slot, mixture.max_experts))
        self._mixtures[slot] = mixture
        self._routers.admit(slot, mixture.routers.parts)
        self.admit(slot, mixture.experts)

    def dismiss(self, slot: int) -> None:
        super().dismiss(slot)
        self._routers.dismiss(slot)
        del self._mixtures[slot]

    def begin(self, table: RowTable) -> bool:
        """For its rows, if any of these mixtures has some."""
        self.bound(table)
        self._table, own = table, self._of_table(table)
        for mixture, segment in own:
            mixture.routers.gates.make_room(segment.num_rows)
        return bool(own)

    def source(self, x_TI: Tensor) -> Tensor:
        """x, after the gates of its rows were written; of bfloat16 as it is, as for `LowRank`."""
        x_TI = x_TI if x_TI.dtype is torch.bfloat16 else super().source(x_TI)
        write_gates(self._routers.address, x_TI, address_of(self._called), torch.get_num_threads())
        return x_TI

    def _of_table(self, table: RowTable) -> list[tuple[_Served, Segment]]:
        return [(own, each) for each in table.segments if (own := self._mixtures.get(each.slot)) is not None]

    @property
    def called_at(self) -> int:
        return self._called[1]

    def calls(self) -> Iterator[RouterCall]:
        assert self._table is not None
        for mixture, segment in self._of_table(self._table):
            own = mixture.routers
            asked = SegmentRouters(own.routers, own.sizes, self._table, segment)
            yield asked, own.gates.gates_NK[: segment.num_rows]
