"""Linear layers of the base that apply, to each row, the adapters that the row table names.

An `AdaptedLinear` takes a layer's place by composition: the base product stays the layer's own. Layers
that read the very same tensor share an `AdaptedGroup`, in which the first one called computes what
adapters add for all of them (one transform, one shrink), and the others find their share ready.

    y = W (x + input changes) + b   +   Σ changes from x   +   changes from y0 = W x + b   +   own products

Base rows get exactly the base product's bits: a row that no adapter touches is never added to. Where every
row of a step is that of one mix whose weights are merged, a layer runs on those, and nothing is added.

Legend: T rows of the batch, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Part
from timbre_server.adapters.active_rows import ActiveRows, RowCopies
from timbre_server.operators.contract import Add, Bound, Change, Operator, OwnProduct
from timbre_server.operators.row_table import RowTable

Product = Callable[[Tensor], Tensor]
"""``x -> W x + b``."""

Programs = Mapping[int, AdapterProgram]
"""Adapter slot -> the program that lives there."""

Operators = Mapping[type[Part], Operator[Any]]
"""Which operator runs each kind of part."""


@dataclass(frozen=True, slots=True)
class InPlace:
    """All that operators do to one layer, where each adds it by itself: the changes lie nowhere else."""

    inputs: tuple[Add, ...]
    outputs: tuple[Add, ...]
    """One at most, to the base's own output."""
    sums: tuple[tuple[int, Add], ...]
    """With the number of the operator."""

    @staticmethod
    def of(bounds: Sequence[Bound], member: int) -> InPlace | None:
        """None: one does not, or the output that it reads would not be the base's own."""
        each = [bound.adds(member) for bound in bounds]
        known = [adds for adds in each if adds is not None]
        inputs = tuple(own.input_change for own in known if own.input_change is not None)
        outputs = tuple(own.output_change for own in known if own.output_change is not None)
        sums = tuple((n, own.sums) for n, own in enumerate(known) if own.sums is not None)
        is_all = len(known) == len(each) and len(outputs) < (1 if inputs else 2)
        return InPlace(inputs, outputs, sums) if is_all else None


class AdaptedGroup:
    """Layers that read one input, and what is prepared for them while the row table repeats."""

    def __init__(
        self, paths: Sequence[str], rows: ActiveRows, programs: Programs, operators: Operators
    ) -> None:
        self.paths = tuple(paths)
        self._rows = rows
        self._programs = programs
        self._operators = operators
        self._bound_table: RowTable | None = None
        self._bound: tuple[Bound, ...] = ()
        self._in_place: tuple[InPlace | None, ...] = ()
        self._input: Tensor | None = None
        self._changes: list[list[Change]] = []
        self._sources: list[Tensor] = []
        self._unread: set[int] = set()

    @property
    def copies(self) -> RowCopies | None:
        return self._rows.copies

    @property
    def rows_are_merged(self) -> bool:
        return self._rows.are_merged

    def bound(self) -> tuple[Bound, ...]:
        """The operators in use at this group, ready for the current table; empty for base rows only."""
        table = self._rows.table
        if table is None:
            return ()
        if self._bound_table is not table:
            self._bound = tuple(self._bind(table))
            own = [InPlace.of(self._bound, member) for member in range(len(self.paths))]
            self._in_place = tuple(own) if None not in own else (None,) * len(own)
            self._bound_table = table
        return self._bound

    def in_place(self, member: int) -> InPlace | None:
        """What `bound` does to a member; None unless it does so to all."""
        return self._in_place[member]

    @property
    def last_bound(self) -> tuple[Bound, ...]:
        """What the last forward with adapters ran, unless one of them was dropped since."""
        return self._bound

    def _bind(self, table: RowTable) -> list[Bound]:
        uses: dict[type[Part], list[dict[int, list[Part]]]] = {}
        for slot in table.slots:
            sites = self._programs[slot].sites
            for member, path in enumerate(self.paths):
                for part in sites.get(path, ()):
                    members = uses.setdefault(type(part), [{} for _ in self.paths])
                    members[member].setdefault(slot, []).append(part)
        return [self._operators[kind].bind(members, table) for kind, members in uses.items()]

    def forget(self) -> None:
        """Drop what was prepared and what is kept of a running step; called when a slot changes hands."""
        self._bound_table = None
        self._bound, self._in_place = (), ()
        self.end_step()

    def end_step(self) -> None:
        """Drop the input and the shares of it that no member fetched (a forward that failed half-way)."""
        self._input = None
        self._changes, self._sources = [], []
        self._unread = set()

    def changes(self, member: int, x: Tensor) -> Sequence[Change]:
        """What the adapters add to one member's output, from the input ``x`` alone.

        Computed for all members when the first asks; kept for the others, who prove by identity that
        theirs is the same tensor. Holding on to x makes that proof safe.
        """
        if self._is_new(member, x):
            self._changes = [[] for _ in self.paths]
            x_TI = rows_of(x).float()
            for bound in self.bound():
                for changes, more in zip(self._changes, bound.sums(x_TI), strict=False):
                    changes.extend(more)
        found = self._changes[member]
        self._has_read(member)
        return found

    def sources(self, member: int, x: Tensor) -> Sequence[Tensor]:
        """What each operator's sums are made of, from a contiguous x; made and kept as `changes` are."""
        if self._is_new(member, x):
            self._sources = [bound.source(x) for bound in self._bound]
        found = self._sources
        self._has_read(member)
        return found

    def _is_new(self, member: int, x: Tensor) -> bool:
        """Whether nothing is kept of x for this member; from now on something is."""
        if self._input is x and member in self._unread:
            return False
        self._input = x
        self._unread = set(range(len(self.paths)))
        return True

    def _has_read(self, member: int) -> None:
        self._unread.discard(member)
        if not self._unread:
            self.end_step()


class AdaptedLinear(nn.Module):
    """One linear layer of the base in an `AdaptedGroup`."""

    def __init__(self, base: nn.Module, product: Product, group: AdaptedGroup, member: int):
        """``product`` computes ``W x + b`` for the layer ``base``, by whatever means is fastest."""
        super().__init__()
        self.base = base
        self.merged: Product | None = None
        """The product with merged weights, where there are any."""
        self._product = product
        self._group = group
        self._member = member
        self._path = group.paths[member]

    @property
    def weight(self) -> Tensor:
        """The base layer's own, as stored: models look at its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        group, member = self._group, self._member
        if self.merged is not None and group.rows_are_merged:
            return self.merged(x)
        bounds, copies = group.bound(), group.copies
        if bounds and copies is None and x.dtype is torch.float32 and x.is_contiguous():
            in_place = group.in_place(member)
            if in_place is not None:
                return self._changed_in_place(in_place, x)
        if all(bound.reads_input_alone for bound in bounds):
            if copies is not None and copies.last == self._path:
                return self._where_copies_meet(copies, x)
            y = self._base_product(x)
            return added(y, group.changes(member, x), is_own=True) if bounds else y
        x_TI = rows_of(x)
        inputs = [c for b in bounds if (c := b.input_change(self._member, x_TI)) is not None]
        y = self._product(added(x, inputs)) if inputs else self._base_product(x)
        sums = self._group.changes(self._member, x)  # Routers choose there for what acts on outputs, too.
        outputs = self._output_changes(bounds, x, y, changed_input=bool(inputs))
        produced = [self._produced(o, x) for b in bounds if (o := b.own_product(self._member, x_TI))]
        changes = [*outputs, *sums, *produced]
        return added(y, changes, is_own=True) if changes else y

    def _changed_in_place(self, own: InPlace, x: Tensor) -> Tensor:
        """As `forward`, for float32 and a contiguous x."""
        changed = x
        if own.inputs:
            changed = x.clone()
            for add in own.inputs:
                add(x, changed)
        y = self._product(changed).contiguous()
        for add in own.outputs:
            add(y, y)
        if own.sums:
            sources = self._group.sources(self._member, x)
            for number, add in own.sums:
                add(sources[number], y)
        return y

    def _base_product(self, x: Tensor) -> Tensor:
        copies = self._group.copies
        if copies is not None and x is copies.x_1PD:
            return self._product(copies.x_1TD).index_select(1, copies.row_P)
        return self._product(x)

    def _where_copies_meet(self, copies: RowCopies, x: Tensor) -> Tensor:
        """``Σ_p g_p (W x_p + b + changes_p)`` for each row, with one base product: the block's output."""
        y = self._product(copies.meet(x).to(x.dtype))
        changes = [copies.met(change) for change in self._group.changes(self._member, x)]
        if self.bias is not None:
            changes.append(copies.bias_change(self.bias))
        copies.have_met = True
        return added(y, changes)

    def _output_changes(
        self, bounds: Sequence[Bound], x: Tensor, y: Tensor, *, changed_input: bool
    ) -> list[Change]:
        """To be added before all others: one alone may read y where it is added to it."""
        y0 = y
        found: list[Change] = []
        for bound in bounds:
            change = bound.output_change(self._member, rows_of(y0))
            if change is not None and changed_input and y0 is y:
                # A gain acts on the base's own output, which an input change of this step has hidden.
                y0 = self._product(x)
                change = bound.output_change(self._member, rows_of(y0))
            if change is not None:
                found.append(change)
        return found if len(found) < 2 else [Change(each.values_NO, each.rows_N) for each in found]

    def _produced(self, own: OwnProduct, x: Tensor) -> Change:
        """One more base product, for the rows that need one."""
        y_NO = self._product(own.x_NI.to(x.dtype)).float()
        product_NO = y_NO if self.bias is None else y_NO - self.bias.float()
        return Change(own.gain_NO * product_NO, own.rows_N)


def rows_of(v: Tensor) -> Tensor:
    """All leading dimensions flattened to the rows of the batch."""
    return v.reshape(-1, v.shape[-1])


def added(v: Tensor, changes: Sequence[Change], *, is_own: bool = False) -> Tensor:
    """``v`` plus changes to some of its rows, summed in float32 and rounded once; v is modified only if it
    ``is_own``, the caller's alone.

    Rows that no change names keep their bits: float32 holds every half-precision value exactly.
    """
    if is_own and len(changes) == 1 and v.is_contiguous() and _is_plain(changes[0]):
        changes[0].add_to(rows_of(v))  # PyTorch sums in the wider type and rounds once: no copy is needed.
        return v
    if not changes:
        return v
    sum_TD = rows_of(v).to(torch.float32, copy=not is_own).contiguous()
    for change in changes:
        change.add_to(sum_TD)
    return sum_TD.to(v.dtype).view(v.shape)


def _is_plain(change: Change) -> bool:
    """Whether its values lie in memory, for rows in order."""
    return type(change) is Change and not isinstance(change.rows_N, Tensor)
