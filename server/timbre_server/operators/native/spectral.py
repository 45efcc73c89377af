"""`Spectral` in C++: rows side by side from the first transform to the last.

Adapters whose coefficients sit at the same places, as those of one seed do, differ in their values alone:
where all rows of a register have such, they go through one pattern together, with copies of the values side
by side. Others go through patterns of their own one by one, and values are read where an adapter's lie. Only
lengths with a prime factor above 256, and gates, are left to the plain operator.

Legend: T rows of the batch, N coefficients, L rows side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import Sources
from timbre_server.operators.native.fourier import factors_of
from timbre_server.operators.native.lanes import Batch, Group, LaneValues, ValuesOf, sum_of_mix
from timbre_server.operators.native.spectral_kernels import BoundSpectral, Core, weight_bits
from timbre_server.operators.native.spectral_patterns import LaneTransform, Pattern
from timbre_server.operators.native.structures import Fields
from timbre_server.operators.row_table import Pairs, RowTable
from timbre_server.operators.spectral import Name, SpectralOperator, name_of

ROW_BYTES = 8
"""Of a coefficient in a row's copy: its value, and as much for places beside it where no row is."""


class _Own:
    """One adapter's parts of one transform at a group of layers; of each member."""

    def __init__(self, members: Members[Spectral], pattern_of: Callable[[Places], Pattern]) -> None:
        self.some_places = [own[0].places if own else None for own in members]
        self.only_places = [_only({part.places for part in own}) for own in members]
        """What all parts have in common, or None."""
        self.most = [max((part.c_N.numel() for part in own), default=0) for own in members]
        """Coefficients of a part."""
        each = [[(pattern_of(part.places), part.c_N.contiguous()) for part in own] for own in members]
        each = [_summed(own) if own and p else own for p, own in zip(self.only_places, each, strict=True)]
        self.values = [own[0][1] if p else None for p, own in zip(self.only_places, each, strict=True)]
        """The sum of all parts, where they have the same places."""
        self.addresses = [[(pattern.address, c_N.data_ptr()) for pattern, c_N in own] for own in each]
        """Of patterns and values: that sum's, or each part's."""
        self._held = each


def _only(places: set[Places] | set[Places | None]) -> Places | None:
    return next(iter(places)) if len(places) == 1 else None


def _summed(parts: list[tuple[Pattern, Tensor]]) -> list[tuple[Pattern, Tensor]]:
    """Parts of one pattern as one."""
    return parts[:1] if len(parts) == 1 else [(parts[0][0], torch.stack([c_N for _, c_N in parts]).sum(0))]


class _Prepared:
    """One adapter's parts at a group of layers."""

    def __init__(self, members: Members[Spectral], pattern_of: Callable[[Places], Pattern]) -> None:
        self.members = members
        parts = [part for own in members for part in own]
        self.is_served = all(_is_served(part.places) for part in parts)
        names = {name_of(part.places) for part in parts} if self.is_served else ()
        self.own = {
            name: _Own([[p for p in own if name_of(p.places) == name] for own in members], pattern_of)
            for name in sorted(names)
        }
        """By transform."""


def _is_served(places: Places) -> bool:
    lengths = (places.in_features, places.out_features)
    return places.transform == "dwt" or all(factors_of(length) is not None for length in lengths)


class NativeSpectral(StandingOperator[Spectral, _Prepared], SpectralOperator):
    """`SpectralOperator` by ``spectral.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._lane_transforms: dict[tuple[Name, int], LaneTransform] = {}
        self._lane_patterns: WeakKeyDictionary[Places, Pattern] = WeakKeyDictionary()
        self._batches: WeakKeyDictionary[RowTable, dict[tuple[frozenset[int], int], Batch]]
        self._batches = WeakKeyDictionary()
        """By what they follow from: most groups of layers have the same."""
        self._seats: dict[tuple[Name, int], Sequence[Pairs]] = {}
        """The last ones, by the transform and the bytes of a row."""
        self._sources: dict[Name, Sources] = {}

    def prepared(self, members: Members[Spectral]) -> _Prepared:
        return _Prepared(members, self.lane_pattern)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingSpectral(self)

    def batch(self, table: RowTable, slots: frozenset[int], name: Name, bytes_per_row: int) -> Batch:
        known = self._batches.setdefault(table, {})
        if (slots, bytes_per_row) not in known:
            found = Batch.of(table, slots, bytes_per_row, self._seats.get((name, bytes_per_row), ()))
            known[slots, bytes_per_row], self._seats[name, bytes_per_row] = found, found.seats
        return known[slots, bytes_per_row]

    def lane_transform(self, places: Places, length: int) -> LaneTransform:
        """The same one for whoever asks, on any thread."""
        key = name_of(places), length
        found = self._lane_transforms.get(key)
        if found is None:
            own = self._transform(places, length, torch.device("cpu"))
            found = self._lane_transforms.setdefault(key, LaneTransform(own, length))
        return found

    def lane_pattern(self, places: Places) -> Pattern:
        """The same. Kept as long as the object of places."""
        found = self._lane_patterns.get(places)
        if found is None:
            lengths = places.in_features, places.out_features
            inner, outer = (self.lane_transform(places, length) for length in lengths)
            found = self._lane_patterns.setdefault(places, Pattern(places, inner, outer))
        return found

    def sources_of(self, name: Name) -> Sources:
        return self._sources.setdefault(name, Sources())


class _StandingSpectral(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeSpectral) -> None:
        self._operator, self._adapters = operator, dict[int, _Prepared]()
        self._others: set[int] = set()
        """Slots of those that are not served."""
        self._transforms: dict[Name, _StandingTransform] = {}
        """In the order of names."""
        self._joined: tuple[list[Bound], JoinedSums] | None = None

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared
        if not prepared.is_served:
            self._others.add(slot)
        for name, own in prepared.own.items():
            if name not in self._transforms:
                self._transforms[name] = _StandingTransform(self._operator, name)
                self._transforms = dict(sorted(self._transforms.items()))
            self._transforms[name].admit(slot, own)

    def dismiss(self, slot: int) -> None:
        self._others.discard(slot)
        for name in self._adapters.pop(slot).own:
            self._transforms[name].dismiss(slot)
            if not self._transforms[name].adapters:
                del self._transforms[name]
                self._joined = None

    def bound(self, table: RowTable) -> Bound:
        if table.is_gated:
            return self._plain(table, [slot for slot in table.slots if slot in self._adapters])
        bounds = [own.bound(table) for own in self._transforms.values() if own.has_any(table)]
        others = [slot for slot in table.slots if slot in self._others] if self._others else []
        if others:
            plain = self._plain(table, others)
            return JoinedSums([*bounds, plain]) if bounds else plain
        if len(bounds) == 1:
            return bounds[0]
        if self._joined is None or self._joined[0] != bounds:
            self._joined = bounds, JoinedSums(bounds)
        return self._joined[1]

    def _plain(self, table: RowTable, slots: Sequence[int]) -> Bound:
        uses = uses_of({slot: self._adapters[slot].members for slot in slots})
        return SpectralOperator.bind(self._operator, uses, table)


class _StandingTransform:
    """Adapters with one transform at one group."""

    def __init__(self, operator: NativeSpectral, name: Name) -> None:
        self._operator, self._name = operator, name
        self.adapters: dict[int, _Own] = {}
        """By slot."""
        self._inner: LaneTransform | None = None
        self._outer: list[LaneTransform | None] = []
        """Of each member that an adapter has ever changed."""
        self._places: list[set[Places | None]] = []
        """What adapters have at each member: `_Own.only_places`."""
        self._most: list[int] = []
        self._values: dict[tuple[int, int], LaneValues] = {}
        """By member and seats, of the table that was bound last."""
        self._bound: BoundSpectral | None = None
        """To that table, or to one before."""

    def admit(self, slot: int, own: _Own) -> None:
        self.adapters[slot] = own
        self._outer = self._outer or [None] * len(own.most)
        for member, places in enumerate(own.some_places):
            if places is not None and self._outer[member] is None:
                self._inner = self._operator.lane_transform(places, places.in_features)
                self._outer[member] = self._operator.lane_transform(places, places.out_features)
                self._drop_bound()
        self._look()

    def dismiss(self, slot: int) -> None:
        del self.adapters[slot]
        for values in self._values.values():
            values.forget(slot)
        if self._bound is not None:  # Whoever still has it keeps nothing of a table.
            self._bound.clear()
        self._look()

    def _look(self) -> None:
        owns = self.adapters.values()
        members = range(len(self._outer))
        self._places = [{own.only_places[n] for own in owns if own.addresses[n]} for n in members]
        self._most = [max((own.most[n] for own in owns), default=0) for n in members]

    def _drop_bound(self) -> None:
        if self._bound is not None:
            self._bound.clear()
        self._bound = None

    def has_any(self, table: RowTable) -> bool:
        return any(slot in self.adapters for slot in table.slots)

    def bound(self, table: RowTable) -> Bound:
        """To a table of some of these."""
        slots = frozenset(slot for slot in table.slots if slot in self.adapters)
        batch = self._operator.batch(table, slots, self._name, ROW_BYTES * sum(self._most))
        if self._bound is None:
            assert self._inner is not None, "an adapter that was admitted changes something"
            self._bound = BoundSpectral(self._inner, self._outer, self._operator.sources_of(self._name))
        before, self._values = self._values, {}
        cores = {
            member: [self._core(member, group, before) for group in batch.kinds]
            for member, outer in enumerate(self._outer)
            if outer is not None
        }
        self._bound.show(batch, cores, max(self._most))
        return self._bound

    def _core(self, member: int, group: Group, before: Mapping[tuple[int, int], LaneValues]) -> Core:
        found = self._places[member]
        if len(found) > 1:
            found = {own.only_places[member] for own in self._of(group) if own.addresses[member]}
        if not found:
            return Core()
        places = _only(found)
        if places is None:
            return self._core_of_each(member, group)
        pattern = self._operator.lane_pattern(places)
        if len(group.mixes) == 1:
            values = sum_of_mix(group.mixes[0], self._values_at(member))
            return Core() if values is None else Core.of_all(pattern, values)
        key = member, group.seats
        own = before.get(key)
        if own is None or not own.serves(pattern.order_N, group):
            own = LaneValues(pattern.order_N, group.lanes)
        own.hold(group, self._values_at(member))
        self._values[key] = own
        return Core.of_all(pattern, own.values_NL)

    def _values_at(self, member: int) -> ValuesOf:
        return lambda slot: self.adapters[slot].values[member] if slot in self.adapters else None

    def _of(self, group: Group) -> Sequence[_Own]:
        return [self.adapters[slot] for slot in group.slots if slot in self.adapters]

    def _core_of_each(self, member: int, group: Group) -> Core:
        uses: list[Fields] = []
        held: list[object] = [self._of(group)]
        for lane, mix in group.taken:
            if len(mix) == 1 and mix[0][0] in self.adapters:
                own, weight = self.adapters[mix[0][0]], weight_bits(mix[0][1])
                uses += [(lane, *addresses, weight) for addresses in own.addresses[member]]
            elif len(mix) > 1:
                told, values = self._told(member, mix)
                uses += [(lane, *use) for use in told]
                held.append(values)
        return Core.of_each(uses, held)

    def _told(self, member: int, mix: Pairs) -> tuple[Sequence[Fields], object]:
        """``SpectralUse`` of a row of this mix, without its lane; and what it has the addresses of."""
        acting = [
            (s, weight) for s, weight in mix if s in self.adapters and self.adapters[s].addresses[member]
        ]
        owns = [(self.adapters[slot], weight) for slot, weight in acting]
        places = _only({own.only_places[member] for own, _ in owns}) if len(owns) > 1 else None
        values = None if places is None else sum_of_mix(tuple(acting), self._values_at(member))
        if places is None or values is None:
            return [(*a, weight_bits(weight)) for own, weight in owns for a in own.addresses[member]], None
        # As where all rows have the same places: a row's bits are its own.
        return [(self._operator.lane_pattern(places).address, values.data_ptr(), weight_bits(1.0))], values
