"""`Routed` in C++, where every expert is of low rank, as in most mixtures, and an adapter's routers all read
the group's own input, or one elsewhere gives all gates; and where experts scale the output, in the first
case. All else is the plain operator's, whose meaning this is.

Legend: T rows of the batch, N rows of one adapter, I in, K gates of one adapter at a group.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from timbre_methods.program import Diagonal, LowRank
from timbre_methods.routing import Routed, Router, Scouted
from timbre_server.operators.contract import (
    Adds,
    Bound,
    Change,
    Members,
    Operator,
    Standing,
    StandingOperator,
    uses_of,
)
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import Sources
from timbre_server.operators.native.gain_experts import WithGains, prepared_gains_of
from timbre_server.operators.native.input_kernels import BoundInputKernels
from timbre_server.operators.native.low_rank_experts import KERNEL, AdapterGates, Experts, prepared_experts
from timbre_server.operators.native.routers import AdapterRouters, write_gates
from timbre_server.operators.native.sides import StandingSides
from timbre_server.operators.native.structures import address_of
from timbre_server.operators.native.uses import Uses
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
        firsts = accumulate(sizes, initial=0)
        columns: dict[Router | Scouted, int] = dict(zip(each, firsts, strict=False))
        share = sum(router.num_kept for router in each) / sum(sizes)
        self.experts = prepared_experts(_experts(members, columns), self.routers.gates, share)
        self.gains = prepared_gains_of(members, columns, self.routers.gates)
        self.max_experts = max(sizes)


class _Given:
    """The same of mixtures whose gates come from one router elsewhere: of a block, or a scout."""

    def __init__(self, members: Members[Routed]) -> None:
        self.router = next(part.router for own in members for part in own)
        self.gates = AdapterGates(self.router.num_experts)
        share = self.router.num_kept / self.router.num_experts
        self.experts = prepared_experts(_experts(members, {self.router: 0}), self.gates, share)


_Prepared = _Served | _Given | Members[Routed]


def _prepared(members: Members[Routed]) -> _Prepared:
    parts = [part for own in members for part in own]
    experts = (inner for part in parts for expert in part.experts for inner in expert)
    kinds = {type(inner) for inner in experts}
    if not kinds <= {LowRank, Diagonal}:
        return members
    if all(part.own_router is not None for part in parts):
        return _Served(members)
    is_one = Diagonal not in kinds and all(
        part.own_router is None and part.router == parts[0].router for part in parts
    )
    return _Given(members) if is_one else members


def _experts(members: Members[Routed], columns: Mapping[Router | Scouted, int]) -> list[Experts]:
    return [
        [
            (inner, columns[part.router] + number)
            for part in parts
            for number, expert in enumerate(part.experts)
            for inner in expert
            if isinstance(inner, LowRank) and inner.a_RI.shape[0]
        ]
        for parts in members
    ]


class NativeRouted(StandingOperator[Routed, _Prepared], RoutedOperator):
    """`RoutedOperator` by ``router.cpp`` and ``low_rank.cpp``."""

    def __init__(self, inner: Sequence[Operator[Any]], step: StepRouting, routers: type[Routers]) -> None:
        super().__init__(inner, step, routers)
        self.sources = Sources()

    def prepared(self, members: Members[Routed]) -> _Prepared:
        return _prepared(members)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingRouted(self, rows)


class _StandingRouted(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeRouted, rows: LiveRows) -> None:
        self._operator = operator
        self._served = _BoundRouted(operator.step, rows, operator.sources)
        self._gains = StandingSides("timbre_diagonal", rows)
        self._gained: set[int] = set()
        """Slots of those that have some."""
        self._given: dict[int, _Given] = {}
        self._others: dict[int, Members[Routed]] = {}

    def admit(self, slot: int, prepared: _Prepared) -> None:
        if isinstance(prepared, _Served):
            self._served.admit_mixture(slot, prepared)
            if prepared.gains:
                self._gains.admit(slot, prepared.gains)
                self._gained.add(slot)
        elif isinstance(prepared, _Given):
            self._served.admit(slot, prepared.experts)
            self._given[slot] = prepared
        else:
            self._others[slot] = prepared

    def dismiss(self, slot: int) -> None:
        if self._others.pop(slot, None) is None:
            self._given.pop(slot, None)
            self._served.dismiss(slot)
        if slot in self._gained:
            self._gained.remove(slot)
            self._gains.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        is_served = self._served.begin(table)
        given = [(self._given[each.slot], each) for each in table.segments if each.slot in self._given]
        others = {slot: self._others[slot] for slot in table.slots if slot in self._others}
        bound: Bound = _BoundGiven(self._served, self._operator.step, table, given) if given else self._served
        if not self._gained.isdisjoint(table.slots):
            bound = WithGains(bound, self._gains.bound(table))
        if not others:
            return bound
        plain = RoutedOperator.bind(self._operator, uses_of(others), table)
        return JoinedSums([bound, plain]) if is_served or given else plain


class _BoundGiven(Bound):
    """Experts some of whose gates are known when their layer runs, and not before."""

    def __init__(
        self,
        experts: _BoundRouted,
        step: StepRouting,
        table: RowTable,
        given: Sequence[tuple[_Given, Segment]],
    ) -> None:
        self._experts, self._step, self._table, self._given = experts, step, table, given

    @property
    def takes_any_type(self) -> bool:
        return True

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        self._put_gates()
        return self._experts.sums(x_TI)

    def adds(self, member: int) -> Adds:
        own = self._experts.adds(member).sums
        return Adds(sums=None if own is None else partial(own))  # Another one than of other tables.

    def source(self, x_TI: Tensor) -> Tensor:
        self._put_gates()
        return self._experts.source(x_TI)

    def _put_gates(self) -> None:
        for mixture, segment in self._given:
            gates_NE = self._step.chosen(mixture.router, self._table, segment)
            mixture.gates.put(gates_NE.contiguous())


class _BoundRouted(BoundInputKernels, LastingRouters):
    """Experts' kernels, and the routers whose gates they read."""

    def __init__(self, step: StepRouting, rows: LiveRows, sources: Sources) -> None:
        super().__init__(KERNEL, rows, sources, reads_bfloat16=True)
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
        self._mixtures.pop(slot, None)

    def begin(self, table: RowTable) -> bool:
        """For its rows, if any of these mixtures has some."""
        self.bound(table)
        self._table, own = table, self._of_table(table)
        for mixture, segment in own:
            mixture.routers.gates.make_room(segment.num_rows)
        return bool(own)

    def source(self, x_TI: Tensor) -> Tensor:
        """x, after the gates of its rows were written."""
        x_TI = super().source(x_TI)
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
