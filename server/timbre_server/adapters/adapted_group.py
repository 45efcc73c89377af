"""Layers of the base that read the very same tensor, and what their adapters make of it.

The first layer called computes what adapters add for all of them (one transform, one shrink), and the others
find their share ready.

Legend: T rows of the batch, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor

from timbre_methods.program import AdapterProgram, Part
from timbre_server.adapters.active_rows import ActiveRows, RowCopies
from timbre_server.adapters.added import rows_of
from timbre_server.adapters.in_place import InPlace
from timbre_server.adapters.shared_input import SharedInput
from timbre_server.native.tape import State, Tape
from timbre_server.operators.contract import Bound, Change, Operator, Standing, StandingOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.row_table import RowTable

Programs = Mapping[int, AdapterProgram]
"""Adapter slot -> the program that lives there."""

Operators = Mapping[type[Part], Operator[Any]]
"""Which operator runs each kind of part."""

PreparedKinds = Mapping[type[Part], object]
"""Of one adapter at one group: what operators have prepared of each kind."""

_MAX_BEHAVIOURS = 32
"""Of a group, that are kept: some 5 kB each, by layer and number of rows that are written down."""


@dataclass(frozen=True, slots=True, eq=False)
class Behaviour:
    """What adapters do at a group; while it is kept, one object for whenever they do the same."""

    in_place: tuple[InPlace | None, ...] = ()
    """What they do to each member in place: to all, or to none."""
    number: int = field(default_factory=State.another)
    """Of `AdaptedGroup.state` while they do so."""
    tapes: dict[object, Tape] = field(default_factory=dict)
    """What members have written down of it, by who did. What they have in common is on the tape of the first:
    all are kept, or none."""
    follows_from_table: bool = field(init=False)
    """As `InPlace.follows_from_table`, of any member."""

    def __post_init__(self) -> None:
        follows = any(own is not None and own.follows_from_table for own in self.in_place)
        object.__setattr__(self, "follows_from_table", follows)


@cache
def _same(kinds: frozenset[type[Part]]) -> frozenset[type[Part]]:
    """One object of all that are equal."""
    return kinds


class _Standing:
    """Adapters that come and go, by the kinds of their parts."""

    def __init__(self, operators: Operators) -> None:
        self._operators = operators
        self.by_kind: dict[type[Part], Standing[Any]] = {}
        """Of operators that have it."""
        self.kinds: dict[int, frozenset[type[Part]]] = {}
        """Of the parts of each slot."""

    def admit(self, slot: int, prepared: PreparedKinds, rows: LiveRows) -> None:
        for kind, own in prepared.items():
            operator = self._operators[kind]
            if isinstance(operator, StandingOperator):
                if kind not in self.by_kind:
                    self.by_kind[kind] = operator.standing(rows)
                self.by_kind[kind].admit(slot, own)
        self.kinds[slot] = _same(frozenset(prepared))

    def dismiss(self, slot: int, prepared: PreparedKinds) -> None:
        """Nothing where it was not admitted."""
        if self.kinds.pop(slot, None) is not None:
            for kind in prepared.keys() & self.by_kind.keys():
                self.by_kind[kind].dismiss(slot)

    def clear(self) -> None:
        self.by_kind, self.kinds = {}, {}


class AdaptedGroup:
    """Layers that read one input, and what is prepared for them: of adapters, and for the table that runs."""

    def __init__(
        self, paths: Sequence[str], rows: ActiveRows, programs: Programs, operators: Operators
    ) -> None:
        self.paths = tuple(paths)
        self._rows = rows
        self._programs = programs
        self._operators = operators
        self._prepared: dict[int, PreparedKinds] = {}
        """By slot: what operators have prepared."""
        self._standing = _Standing(operators)
        """Of these, what steps have used."""
        self._bound_table: RowTable | None = None
        self._bound: tuple[Bound, ...] = ()
        self._base, self._merged, self._nothing = Behaviour(), Behaviour(), Behaviour()
        """Where adapters add nothing, where weights are merged, and where nobody knows."""
        self._behaviour = self._nothing
        """Of what is bound."""
        self._behaviours: dict[tuple[InPlace | None, ...], Behaviour] = {}
        """By what is done in place, what was bound last at the end."""
        self._has_admitted = False
        """Since the last bind: who is bound to may act on members that nobody acted on before."""
        self.state = State()
        """Another one whenever the members, asked by a tape, may do anything else than before."""
        self._input = SharedInput(len(self.paths))

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
            self.state.number = (self._merged if self._rows.are_merged else self._base).number
            return ()
        if self._bound_table is not table:
            found = self._bind(table)
            if found != self._bound or self._has_admitted or self._behaviour.follows_from_table:
                self._behaviour = self._behaviour_of(found, table)
            self._bound, self._bound_table, self._has_admitted = found, table, False
        self.state.number = (self._behaviour if self._bound else self._base).number
        return self._bound

    def _behaviour_of(self, bounds: Sequence[Bound], table: RowTable) -> Behaviour:
        own = [InPlace.of(bounds, member, table) for member in range(len(self.paths))]
        in_place = tuple(own) if None not in own else (None,) * len(own)
        if in_place == self._behaviour.in_place:
            return self._behaviour
        found = self._behaviours.pop(in_place, None) or Behaviour(in_place)
        if None not in own and not all(bound.outlasts_tables for bound in bounds):
            return found  # It holds what was made for one table.
        self._behaviours[in_place] = found
        if len(self._behaviours) > _MAX_BEHAVIOURS:
            del self._behaviours[next(iter(self._behaviours))]
        return found

    def acts_on_none(self) -> bool:
        """Whether all rows are base rows here."""
        return not self.bound()

    def in_place(self, member: int) -> InPlace | None:
        """What `bound` does to a member; None unless it does so to all."""
        return self._behaviour.in_place[member]

    @property
    def tapes(self) -> dict[object, Tape]:
        """As `Behaviour.tapes`, of what `in_place` does."""
        return self._behaviour.tapes

    @property
    def outlasts_tables(self) -> bool:
        """As `Bound.outlasts_tables`, of `bound`."""
        return all(bound.outlasts_tables for bound in self._bound)

    @property
    def last_bound(self) -> tuple[Bound, ...]:
        """What the last forward with adapters ran, unless one of them was dropped since."""
        return self._bound

    def _bind(self, table: RowTable) -> tuple[Bound, ...]:
        # Few objects are looked at here: after a step each is fetched from memory, at every group.
        standing = self._standing.kinds
        each = {standing.get(slot) for slot in table.slots}
        if None in each:
            for slot in table.slots:
                if slot not in standing:
                    self._admit(slot)
            each = {standing[slot] for slot in table.slots}
        kinds = frozenset[type[Part]]().union(*(own for own in each if own))
        # In one order: that of a row's sums does not follow from other rows.
        return tuple(self._bind_kind(kind, table) for kind in self._operators if kind in kinds)

    def _bind_kind(self, kind: type[Part], table: RowTable) -> Bound:
        if kind in self._standing.by_kind:
            return self._standing.by_kind[kind].bound(table)
        own = {slot: self._prepared[slot] for slot in table.slots}
        adapters = {slot: prepared[kind] for slot, prepared in own.items() if kind in prepared}
        return self._operators[kind].bind_prepared(adapters, table)

    def prepared(self, program: AdapterProgram) -> PreparedKinds:
        """What `expect` takes. On any thread."""
        kinds: dict[type[Part], list[list[Part]]] = {}
        for member, path in enumerate(self.paths):
            for part in program.sites.get(path, ()):
                kinds.setdefault(type(part), [[] for _ in self.paths])[member].append(part)
        return {kind: self._operators[kind].prepared(members) for kind, members in kinds.items()}

    def expect(self, slot: int, prepared: PreparedKinds) -> None:
        """What is prepared of the slot's program need not be when a row uses it."""
        self._prepared[slot] = prepared

    def _admit(self, slot: int) -> None:
        if slot not in self._prepared:
            self._prepared[slot] = self.prepared(self._programs[slot])
        self._unbind()
        try:
            self._standing.admit(slot, self._prepared[slot], self._rows.live)
        except BaseException:  # Nobody knows what stands: the next step begins anew.
            self._standing.clear()
            self._behaviours.clear()
            self._drop_bound()
            raise
        self._has_admitted = True

    def forget(self, slot: int) -> None:
        """Drop what was prepared of it and what is kept of a running step; called when it changes hands.

        Also the bind: the next table may be equal to the last one, and not name the same adapters."""
        self._standing.dismiss(slot, self._prepared.pop(slot, {}))
        self._unbind()
        self.end_step()

    def _unbind(self) -> None:
        self._bound_table = None
        if not self.outlasts_tables:
            self._drop_bound()

    def _drop_bound(self) -> None:
        self._bound, self._behaviour = (), self._nothing
        self.state.number = self._nothing.number

    def end_step(self) -> None:
        """Drop the input and the shares of it that no member fetched (a forward that failed half-way)."""
        self._input.drop()

    def changes(self, member: int, x: Tensor) -> Sequence[Change]:
        """What the adapters add to one member's output, from the input ``x`` alone."""
        found: Sequence[Sequence[Change]] = self._input.made(member, x, self._all_changes)
        return found[member]

    def _all_changes(self, x: Tensor) -> Sequence[Sequence[Change]]:
        found: list[list[Change]] = [[] for _ in self.paths]
        own_TI = rows_of(x)
        x_TI = own_TI.float()
        for bound in self.bound():
            sums = bound.sums(own_TI if bound.takes_any_type else x_TI)
            for changes, more in zip(found, sums, strict=False):
                changes.extend(more)
        return found

    def sources(self, member: int, x: Tensor) -> Sequence[Any]:
        """What each operator's sums are made of, from a contiguous x."""
        found: Sequence[Any] = self._input.made(member, x, self._all_sources)
        return found

    def _all_sources(self, x: Tensor) -> Sequence[Any]:
        return [bound.source(x) for bound in self._bound]
