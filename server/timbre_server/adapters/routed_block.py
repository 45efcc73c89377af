"""A block of the base (an MLP) in which each row's own choice of experts acts.

Where experts meet at the sites below, the block only tells those its gates. Where they meet after the block,
it runs on *copies*: a row of an adapter that keeps k experts is there k times, with one expert each, and the
copies' outputs are summed with the gates. In a mix with other adapters these act on every copy; of two such
adapters each copy has one expert of both, and the product of their gates: the effective weights under a
choice are exactly ``W + Σ w_k (W_k - W)``.

The module stays where and what it is: hooks before and after its forward do all this.

Legend: T rows, N rows of one adapter, P copies of all rows, M copies of one adapter's rows, E experts, K kept
experts, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.routing import RoutedBlock
from timbre_server.adapters.active_rows import ActiveRows, RowCopies
from timbre_server.adapters.groups import Block
from timbre_server.operators.router import BoundRouters
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.step_routing import SegmentRouters, StepRouting


class RoutedBlockLayer:
    """One block, while the row table repeats."""

    def __init__(
        self,
        module: nn.Module,
        block: Block,
        rows: ActiveRows,
        programs: Mapping[int, AdapterProgram],
        step: StepRouting,
    ) -> None:
        self._block = block
        self._rows = rows
        self._programs = programs
        self._step = step
        self._table: RowTable | None = None
        self._choices: _Choices | None = None
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def forget(self) -> None:
        """Drop what was prepared; called when a slot changes hands."""
        self._table = self._choices = None

    def _choices_of(self, table: RowTable | None) -> _Choices | None:
        """None where no adapter of the table routes here."""
        if table is not None and table is not self._table:
            parts = {
                slot: part
                for slot in table.slots
                for part in self._programs[slot].sites.get(self._block.path, ())
                if isinstance(part, RoutedBlock)
            }
            self._table = table
            self._choices = _Choices(parts, table) if parts else None
        return None if table is None else self._choices

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        choices = self._choices_of(self._rows.table)
        if choices is None:
            return None
        (x_1TD,) = args
        gate_P = choices.choose(x_1TD.flatten(0, -2).float(), self._step)
        if not choices.are_copied:
            return None
        x_1PD = x_1TD.index_select(1, choices.row_P)
        self._step.rows_of_copies[choices.table] = choices.row_P
        self._rows.table = choices.table
        self._rows.copies = RowCopies(x_1TD, x_1PD, choices.row_P, gate_P, self._block.last)
        return (x_1PD,)

    def _leave(self, module: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        self._step.block_ends()
        copies = self._rows.copies
        if copies is None:
            return None
        self._rows.table, self._rows.copies = self._table, None
        return y if copies.have_met else copies.meet(y).to(y.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Chooser:
    """One adapter that routes here."""

    part: RoutedBlock
    row_M: Tensor
    """Of each copy, the row of this adapter that it is of, counted among its own."""
    nth_M: Tensor
    """Of each copy, which of the kept experts it has, from 0, where each has one."""
    copy_M: Tensor
    """Which of all copies these are."""


class _Choices:
    """Who chooses in a block, ready for one table."""

    def __init__(self, parts: Mapping[int, RoutedBlock], table: RowTable) -> None:
        self._base_table = table
        self._routing = [segment for segment in table.segments if segment.slot in parts]
        self._routers = BoundRouters([(segment, [parts[segment.slot].router]) for segment in self._routing])
        self.are_copied = any(part.copies > 1 for part in parts.values())
        copies = [_copies_by_slot(span, parts) for span in table.spans]
        spans = [
            Span(span.num_rows * math.prod(own.values()), span.pairs)
            for span, own in zip(table.spans, copies, strict=True)
        ]
        self.table = RowTable(spans, table.device)
        """Of the copies, those of a row next to each other."""
        per_row = torch.tensor([math.prod(own.values()) for own in copies], device=table.device)
        num_rows = torch.tensor([span.num_rows for span in table.spans], device=table.device)
        rows_T = torch.arange(table.num_rows, device=table.device)
        self.row_P = rows_T.repeat_interleave(per_row.repeat_interleave(num_rows))
        """Of each copy, the row."""
        after = {segment.slot: segment.rows_N for segment in self.table.segments}
        self._choosers = [
            _Chooser(
                parts[segment.slot],
                torch.searchsorted(segment.rows_N, self.row_P[after[segment.slot]]),
                _nth(segment.slot, table.spans, copies).to(table.device),
                after[segment.slot],
            )
            for segment in self._routing
        ]

    def choose(self, x_TD: Tensor, step: StepRouting) -> Tensor:
        """Tells the sites below their gates, and returns how much each copy's output counts, [P]."""
        gate_P = torch.ones(len(self.row_P), device=x_TD.device)
        found = zip(self._routing, self._choosers, self._routers.gates(x_TD), strict=True)
        for segment, chooser, gates_NE in found:
            asked = SegmentRouters.of([chooser.part.router], self._base_table, segment)
            step.note([(asked, gates_NE)])
            gates_ME = gates_NE.index_select(0, chooser.row_M) if self.are_copied else gates_NE
            if chooser.part.copies > 1:
                best_NE = torch.sort(gates_NE, dim=1, descending=True, stable=True).indices
                expert_M1 = best_NE[chooser.row_M, chooser.nth_M].unsqueeze(1)
                gate_P[chooser.copy_M] *= gates_ME.gather(1, expert_M1).squeeze(1)
                gates_ME = torch.zeros_like(gates_ME).scatter_(1, expert_M1, 1.0)
            step.choose(chooser.part.router, gates_ME)
        return gate_P


def _copies_by_slot(span: Span, parts: Mapping[int, RoutedBlock]) -> dict[int, int]:
    """How many experts each adapter of a span keeps; their product is how often each row is there."""
    return {slot: parts[slot].copies for slot, _ in span.pairs if slot in parts}


def _nth(slot: int, spans: Sequence[Span], copies: Sequence[Mapping[int, int]]) -> Tensor:
    """Of each copy of an adapter's rows, which of its kept experts it has: copies count through them."""
    found: list[Tensor] = []
    for span, own in zip(spans, copies, strict=True):
        if slot in own:
            before = math.prod(count for other, count in takewhile(lambda item: item[0] != slot, own.items()))
            of_row = torch.arange(math.prod(own.values())) // before % own[slot]
            found.append(of_row.repeat(span.num_rows))
    return torch.cat(found)
