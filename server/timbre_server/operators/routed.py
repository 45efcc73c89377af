"""`Routed`: ``y += Σ_e g_e(x) · E_e(x)``, for rows with different mixtures of experts.

Experts of low rank are one low-rank part of all their ranks together, with a gate for each row and rank
between shrink and expand: no row is sorted and no expert is looped over. Spectral experts run on a table
whose weights are the gates, so that a row is transformed once for all of its experts. Experts that scale the
output mix their gains. All others go through their own operators, each expert's rows multiplied by its gates:
what is linear in x does not care where a gate multiplies.

Legend: T rows of the batch, N rows of one adapter, P rows of other experts, I in, O out, E experts, R ranks
of one adapter at all members, K gates of one adapter at a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from timbre_methods.program import Diagonal, FromInput, LowRank, Part, Spectral
from timbre_methods.routing import Routed
from timbre_server.operators.contract import Adds, Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.gates import Gates
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.router import BoundRouters, Routers, router_gates
from timbre_server.operators.row_table import RowTable, Segment, Span
from timbre_server.operators.step_routing import StepRouting


class RoutedOperator(Operator[Routed]):
    part = Routed

    def __init__(
        self, inner: Sequence[Operator[Any]], step: StepRouting, routers: type[Routers] = BoundRouters
    ) -> None:
        """``inner`` run the experts; ``step`` has what blocks choose for the sites below them."""
        self.routers = routers
        self._inner: Mapping[type[Part], Operator[Any]] = {operator.part: operator for operator in inner}
        self._low_rank = next(operator for operator in inner if isinstance(operator, LowRankOperator))
        self.step = step

    def meaning(self, part: Routed, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        router = part.own_router
        if router is not None:
            gates_TE = router_gates(router, x_TI)
        else:
            gates_TE = x_TI.new_ones(len(x_TI), part.router.num_experts)
        total_TO = torch.zeros_like(y_TO)
        for gate_T, expert in zip(gates_TE.T, part.experts, strict=True):
            for inner in expert:
                change_TO = self._inner[type(inner)].meaning(inner, x_TI, y_TO).change_TO
                assert change_TO is not None, "experts change the output alone"
                total_TO += gate_T.unsqueeze(1) * change_TO
        return Meaning(change_TO=total_TO)

    def bind(self, uses: Uses[Routed], table: RowTable) -> Bound:
        gates = Gates(uses, table, self.step, self.routers)
        experts = [_experts(parts_by_slot, gates) for parts_by_slot in uses]
        kinds = {type(part) for own in experts for expert in own for part in expert.parts}
        sums: list[_LowRankExperts | _SpectralExperts] = []
        if Spectral in kinds:
            sums.append(_SpectralExperts(self._inner[Spectral], experts, gates, table))
        if LowRank in kinds:
            sums.append(_LowRankExperts(self._low_rank, experts, gates, table))
        gains = [_Gains.of(own, gates) if Diagonal in kinds else None for own in experts]
        rest = kinds - {LowRank, Spectral, Diagonal}
        others = [list(self._others(own, table)) if rest else [] for own in experts]
        return _BoundRouted(gates, sums, gains, others)

    def _others(self, experts: Sequence[_Expert], table: RowTable) -> Iterator[_OtherExperts]:
        """One for each further kind of part that one member's experts have."""
        segments = {segment.slot: segment for segment in table.segments}
        by_kind: dict[type[Part], list[tuple[_Expert, list[FromInput]]]] = {}
        for expert in experts:
            for kind in dict.fromkeys(type(part) for part in expert.parts):
                if kind not in (LowRank, Spectral, Diagonal):
                    own = [p for p in expert.parts if type(p) is kind and not isinstance(p, Diagonal)]
                    by_kind.setdefault(kind, []).append((expert, own))
        for part_kind, found in by_kind.items():
            rows = [segments[expert.slot].rows_N for expert, _ in found]
            inner_table = RowTable(
                [Span(len(rows_N), ((number, 1.0),)) for number, rows_N in enumerate(rows)], table.device
            )
            uses = [{number: parts for number, (_, parts) in enumerate(found)}]
            yield _OtherExperts(
                self._inner[part_kind].bind(uses, inner_table),
                torch.cat(rows),
                tuple((segments[expert.slot], expert.column) for expert, _ in found),
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Expert:
    """One expert of one adapter at one member: its parts, and the column of its gate."""

    slot: int
    column: int
    parts: tuple[FromInput | Diagonal, ...]


def _experts(parts_by_slot: Mapping[int, Sequence[Routed]], gates: Gates) -> list[_Expert]:
    """Of one member, in the order of segments, parts and experts."""
    return [
        _Expert(segment.slot, gates.first_column(segment.slot, part.router) + number, parts)
        for segment in gates.segments
        for part in parts_by_slot.get(segment.slot, ())
        for number, parts in enumerate(part.experts)
    ]


class _LowRankExperts:
    """All experts of low rank at a group."""

    def __init__(
        self, operator: LowRankOperator, members: Sequence[Sequence[_Expert]], gates: Gates, table: RowTable
    ) -> None:
        self._gates = gates
        columns: dict[int, list[int]] = {}
        uses: list[dict[int, list[LowRank]]] = [{} for _ in members]
        for own, parts_by_slot in zip(members, uses, strict=True):
            for expert in own:
                for part in expert.parts:
                    if isinstance(part, LowRank):
                        parts_by_slot.setdefault(expert.slot, []).append(part)
                        columns.setdefault(expert.slot, []).extend([expert.column] * part.a_RI.shape[0])
        self._bound = operator.bind_gated(uses, table, gates.gating(columns))

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return self._bound.sums(x_TI, self._gates.of)


class _SpectralExperts:
    """All spectral experts at a group: each as an adapter of its own, with its gates for weights."""

    def __init__(
        self,
        operator: Operator[Spectral],
        members: Sequence[Sequence[_Expert]],
        gates: Gates,
        table: RowTable,
    ) -> None:
        self._gates = gates
        numbers: dict[tuple[int, int], int] = {}
        uses: list[dict[int, list[Spectral]]] = [{} for _ in members]
        for own, parts_by_number in zip(members, uses, strict=True):
            for expert in own:
                parts = [part for part in expert.parts if isinstance(part, Spectral)]
                if parts:
                    number = numbers.setdefault((expert.slot, expert.column), len(numbers))
                    parts_by_number.setdefault(number, []).extend(parts)
        spans = [
            Span(
                span.num_rows,
                tuple((numbers[key], 1.0) for slot, _ in span.pairs for key in numbers if key[0] == slot),
                in_chunk=span.in_chunk,
            )
            for span in table.spans
        ]
        gated = RowTable(spans, table.device, is_gated=True)
        self._bound = operator.bind(uses, gated)
        before = {segment.slot: segment for segment in table.segments}
        after = {segment.slot: segment for segment in gated.segments}
        self._experts = [
            (after[number].weights_N, before[slot], column) for (slot, column), number in numbers.items()
        ]

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        for weights_N, segment, column in self._experts:
            torch.mul(self._gates.of(segment.slot)[:, column], segment.weights_N, out=weights_N)
        return self._bound.sums(x_TI)


@dataclass(frozen=True, slots=True, eq=False)
class _Gains:
    """Experts of one member that scale and shift its output."""

    gates: Gates
    by_segment: Sequence[tuple[Segment, Tensor, Tensor, Tensor]]
    """Columns of the gates, then gain - 1 and shift, [E, O]."""

    @staticmethod
    def of(experts: Sequence[_Expert], gates: Gates) -> _Gains | None:
        found: list[tuple[Segment, Tensor, Tensor, Tensor]] = []
        for segment in gates.segments:
            own = [
                (expert.column, part)
                for expert in experts
                for part in expert.parts
                if expert.slot == segment.slot and isinstance(part, Diagonal)
            ]
            if own:
                gain_EO = torch.stack([part.gain for _, part in own]) - 1
                shift_EO = torch.stack(
                    [torch.zeros_like(p.gain) if p.shift is None else p.shift for _, p in own]
                )
                columns = torch.tensor([column for column, _ in own], device=gain_EO.device)
                found.append((segment, columns, gain_EO, shift_EO))
        return _Gains(gates, found) if found else None

    def change(self, y_TO: Tensor) -> Change:
        values = []
        for segment, columns, gain_EO, shift_EO in self.by_segment:
            gates_NE = self.gates.of(segment.slot).index_select(1, columns) * segment.weights_N.unsqueeze(1)
            values.append((gates_NE @ gain_EO) * y_TO[segment.index].float() + gates_NE @ shift_EO)
        return Change(torch.cat(values), torch.cat([segment.rows_N for segment, *_ in self.by_segment]))


@dataclass(frozen=True, slots=True, eq=False)
class _OtherExperts:
    """Experts of one further kind at one member, expert after expert; row p of theirs is ``rows_P[p]``."""

    bound: Bound
    rows_P: Tensor
    experts: tuple[tuple[Segment, int], ...]
    """With the column of their gates."""

    def changes(self, x_TI: Tensor, gates: Gates) -> list[Change]:
        gate_P = torch.cat([gates.of(s.slot)[:, column] * s.weights_N for s, column in self.experts])
        x_PI = x_TI[self.rows_P] * gate_P.unsqueeze(1)
        return [
            Change(change.values_NO, self.rows_P if change.rows_N is None else self.rows_P[change.rows_N])
            for change in self.bound.sums(x_PI)[0]
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _BoundRouted(Bound):
    gates: Gates
    of_group: Sequence[_LowRankExperts | _SpectralExperts]
    gains: Sequence[_Gains | None]
    others: Sequence[Sequence[_OtherExperts]]

    @property
    def reads_input_alone(self) -> bool:
        return not any(self.gains)

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        self.gates.compute(x_TI)
        changes = [[c for other in own for c in other.changes(x_TI, self.gates)] for own in self.others]
        for experts in self.of_group:
            for own, more in zip(changes, experts.sums(x_TI), strict=True):
                own.extend(more)
        return changes

    def adds(self, member: int) -> Adds | None:
        return Adds(sums=partial(_add, member)) if self.reads_input_alone else None

    def source(self, x_TI: Tensor) -> Any:
        return self.sums(x_TI.reshape(-1, x_TI.shape[-1]).float())

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        """After `sums` of the same step, which computed the gates."""
        gains = self.gains[member]
        return None if gains is None else gains.change(y_TO)


def _add(member: int, changes: Sequence[Sequence[Change]], y_TO: Tensor) -> None:
    for change in changes[member]:
        change.add_to(y_TO.reshape(-1, y_TO.shape[-1]))
