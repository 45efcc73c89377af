"""A block of the base (an MLP) in which each row's own choice of experts acts.

Where experts meet at the sites below, the block only tells those its gates. Where they meet after the block,
it runs on *copies*: a row of an adapter that keeps k experts is there k times, with one expert each, and the
copies' outputs are summed with the gates. In a mix with other adapters these act on every copy; of two such
adapters each copy has one expert of both, and the product of their gates: the effective weights under a
choice are exactly ``W + Σ w_k (W_k - W)``.

The module stays where and what it is, and its forward does all this around what it was.

Legend: T rows, N rows of one adapter, P copies of all rows, M copies of one adapter's rows, E experts, K kept
experts, D features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.routing import RoutedBlock, Router
from timbre_server.adapters.active_rows import ActiveRows, RowCopies
from timbre_server.adapters.groups import Block
from timbre_server.adapters.packed_sites import PackedSites
from timbre_server.native.recording import either
from timbre_server.native.tape import State
from timbre_server.operators.router import Routers
from timbre_server.operators.row_table import RowTable, Segment, Span
from timbre_server.operators.step_routing import SegmentRouters, StepRouting


class RoutedBlocks:
    """All blocks of a model, and what they share: they mostly have the same adapters, which choose alike."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        rows: ActiveRows,
        step: StepRouting,
        routers: type[Routers],
    ) -> None:
        self._routers = routers
        self._table: RowTable | None = None
        self._layouts: dict[tuple[tuple[int, Kind], ...], _Layout] = {}
        """Of the last table."""
        self._layers = {
            block.path: _RoutedBlockLayer(model.get_submodule(block.path), block, rows, step, self)
            for block in blocks
        }

    @property
    def paths(self) -> Set[str]:
        return self._layers.keys()

    def put(self, slot: int, program: AdapterProgram) -> None:
        """Let a free slot hold what a program has for blocks."""
        assert isinstance(program.sites, PackedSites) or all(
            path in self.paths
            for path, parts in program.sites.items()
            if any(isinstance(part, RoutedBlock) for part in parts)
        ), "a router for a block that the model does not have"
        for path in program.sites.keys() & self.paths:
            for part in program.sites[path]:
                if isinstance(part, RoutedBlock):
                    self._layers[path].put(slot, part)

    def drop(self, slot: int) -> None:
        """Also what was prepared, whoever it was for."""
        for layer in self._layers.values():
            layer.drop(slot)

    def see_copies(self) -> tuple[str, ...]:
        """What paths of layers begin with that will see copies of the rows that are set."""
        return tuple(f"{path}." for path, layer in self._layers.items() if layer.copies_rows)

    def choices(self, parts: Mapping[int, RoutedBlock], table: RowTable) -> _Choices:
        """Of adapters that route at a block."""
        if table is not self._table:
            self._table, self._layouts = table, {}
        kinds = {slot: (part.router.num_experts, part.copies) for slot, part in parts.items()}
        key = tuple(kinds.items())
        if key not in self._layouts:
            self._layouts[key] = _Layout(kinds, table)
        layout, by_slot = self._layouts[key], {slot: part.router for slot, part in parts.items()}
        each = [(segment, [by_slot[segment.slot]]) for own in layout.alike for segment in own.segments]
        return _Choices(table, layout, self._routers(each), by_slot)


class _RoutedBlockLayer:
    """One block, while the row table repeats."""

    def __init__(
        self, module: nn.Module, block: Block, rows: ActiveRows, step: StepRouting, blocks: RoutedBlocks
    ) -> None:
        self._last = block.last
        self._rows, self._step, self._blocks = rows, step, blocks
        self._parts: dict[int, RoutedBlock] = {}
        """By slot, of adapters that route here."""
        self._table: RowTable | None = None
        self._choices: _Choices | None = None
        self._state = State()
        """Another one whenever rows begin to be routed here, or cease."""
        self._plain = module.forward
        module.forward = self._forward

    def put(self, slot: int, part: RoutedBlock) -> None:
        self._parts[slot] = part

    def drop(self, slot: int) -> None:
        self._parts.pop(slot, None)
        self._table = None
        self._set_choices(None)

    @property
    def copies_rows(self) -> bool:
        """Whether layers in it see copies of the rows that are set."""
        return not self._acts_on_none() and self._choices is not None and self._choices.layout.are_copied

    def _acts_on_none(self) -> bool:
        table = self._rows.table
        if table is None or not self._parts:
            self._set_choices(None)
        elif table is not self._table or self._choices is None:
            parts = {slot: self._parts[slot] for slot in table.slots if slot in self._parts}
            self._set_choices(self._blocks.choices(parts, table) if parts else None)
        self._table = table
        return self._choices is None

    def _set_choices(self, choices: _Choices | None) -> None:
        if (choices is None) != (self._choices is None):
            self._state.change()
        self._choices = choices

    def _forward(self, x: Tensor) -> Tensor:
        return either(self._state, self._acts_on_none, self._plain, self._routed, x)

    def _routed(self, x_1TD: Tensor) -> Tensor:
        choices = self._choices
        assert choices is not None
        gate_P = choices.choose(x_1TD.flatten(0, -2).float(), self._step)
        if not choices.layout.are_copied:
            y: Tensor = self._plain(x_1TD)
            self._step.block_ends()
            return y
        layout = choices.layout
        copies = RowCopies(x_1TD, x_1TD.index_select(1, layout.row_P), layout.row_P, gate_P, self._last)
        self._step.rows_of_copies[layout.table] = layout.row_P
        with self._rows.copied(copies, layout.table):
            y = self._plain(copies.x_1PD)
        self._step.block_ends()
        return y if copies.have_met else copies.meet(y).to(y.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class _Alike:
    """Adapters whose routers choose among as many experts, and keep as many: all their rows one after the
    other, and all their copies."""

    segments: Sequence[Segment]
    num_kept: int
    row_M: Tensor
    """Of each copy, the row that it is of, counted among these."""
    nth_M: Tensor
    """Of each copy, which of the kept experts it has, from 0, where each has one."""
    copy_M: Tensor
    """Which of all copies these are."""
    sizes: Sequence[int]
    """How many copies each adapter's rows have."""


Kind = tuple[int, int]
"""How many experts an adapter has at a block, and how many copies of each of its rows."""


class _Layout:
    """Of the copies of a table's rows, where adapters choose so."""

    def __init__(self, kinds: Mapping[int, Kind], table: RowTable) -> None:
        """``kinds``: by slot."""
        counts = {slot: copies for slot, (_, copies) in kinds.items()}
        self.are_copied = any(count > 1 for count in counts.values())
        copies = [{slot: counts[slot] for slot, _ in span.pairs if slot in counts} for span in table.spans]
        spans = [
            Span(span.num_rows * math.prod(own.values()), span.pairs, in_chunk=span.in_chunk)
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
        by_kind: dict[Kind, list[Segment]] = {}
        for segment in table.segments:
            if segment.slot in kinds:
                by_kind.setdefault(kinds[segment.slot], []).append(segment)
        self.alike: list[_Alike] = []
        for (_, num_kept), segments in by_kind.items():
            firsts = accumulate((segment.num_rows for segment in segments), initial=0)
            own_copies = [after[segment.slot] for segment in segments]
            rows = [
                torch.searchsorted(segment.rows_N, self.row_P[copy_M]) + first
                for segment, copy_M, first in zip(segments, own_copies, firsts, strict=False)
            ]
            nth = [_nth(segment.slot, table.spans, copies).to(table.device) for segment in segments]
            row_M, nth_M, copy_M = map(torch.cat, (rows, nth, own_copies))
            sizes = [len(own) for own in own_copies]
            self.alike.append(_Alike(segments, num_kept, row_M, nth_M, copy_M, sizes))


@dataclass(frozen=True, slots=True, eq=False)
class _Choices:
    """Who chooses in a block, ready for one table."""

    table: RowTable
    layout: _Layout
    routers: Routers
    """Of the layout's segments, in order."""
    by_slot: Mapping[int, Router]

    def choose(self, x_TD: Tensor, step: StepRouting) -> Tensor:
        """Tells the sites below their gates, and returns how much each copy's output counts, [P]."""
        gate_P = torch.ones(len(self.layout.row_P), device=x_TD.device)
        gates = iter(self.routers.gates(x_TD))
        for own in self.layout.alike:
            each_NE: Sequence[Tensor] = tuple(islice(gates, len(own.segments)))
            routers = [self.by_slot[segment.slot] for segment in own.segments]
            for router, segment, gates_NE in zip(routers, own.segments, each_NE, strict=True):
                step.note([(SegmentRouters.of([router], self.table, segment), gates_NE)])
            if self.layout.are_copied:
                each_NE = self._of_copies(own, torch.cat(list(each_NE)), gate_P)
            for router, gates_NE in zip(routers, each_NE, strict=True):
                step.choose(router, gates_NE)
        return gate_P

    def _of_copies(self, own: _Alike, gates_NE: Tensor, gate_P: Tensor) -> Sequence[Tensor]:
        """The gates of each adapter's copies; of those with one expert each, that one's is left for after the
        block."""
        gates_ME = gates_NE.index_select(0, own.row_M)
        if own.num_kept > 1:
            best_NE = torch.sort(gates_NE, dim=1, descending=True, stable=True).indices
            expert_M1 = best_NE[own.row_M, own.nth_M].unsqueeze(1)
            # A copy that is of two adapters is here twice.
            gate_P.scatter_reduce_(0, own.copy_M, gates_ME.gather(1, expert_M1).squeeze(1), "prod")
            gates_ME = torch.zeros_like(gates_ME).scatter_(1, expert_M1, 1.0)
        return gates_ME.split_with_sizes(own.sizes)


def _nth(slot: int, spans: Sequence[Span], copies: Sequence[Mapping[int, int]]) -> Tensor:
    """Of each copy of an adapter's rows, which of its kept experts it has: copies count through them."""
    found: list[Tensor] = []
    for span, own in zip(spans, copies, strict=True):
        if slot in own:
            before = math.prod(count for other, count in takewhile(lambda item: item[0] != slot, own.items()))
            of_row = torch.arange(math.prod(own.values())) // before % own[slot]
            found.append(of_row.repeat(span.num_rows))
    return torch.cat(found)
