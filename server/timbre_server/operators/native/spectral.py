"""`Spectral` in C++: rows side by side from the first transform to the last.

Adapters whose coefficients sit at the same places, as those of one seed do, differ in their values alone:
where all rows of a register have such, they go through one pattern together, with copies of the values side
by side. Others go through patterns of their own one by one, and values are read where an adapter's lie. Only
lengths with a large prime factor, and gates, are left to the plain operator.

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
from timbre_server.operators.native.fourier import factors_of
from timbre_server.operators.native.lanes import NO_ROW, Batch, Group, LaneValues, sum_of_mix
from timbre_server.operators.native.spectral_kernels import BoundSpectral, Core, weight_bits
from timbre_server.operators.native.spectral_patterns import LaneTransform, Pattern
from timbre_server.operators.native.uses import Fields, Sources
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
        key = name_of(places), length
        if key not in self._lane_transforms:
            own = self._transform(places, length, torch.device("cpu"))
            self._lane_transforms[key] = LaneTransform(own, length)
        return self._lane_transforms[key]

    def lane_pattern(self, places: Places) -> Pattern:
        """Kept as long as the object of places."""
        if places not in self._lane_patterns:
            cpu, lengths = torch.device("cpu"), (places.in_features, places.out_features)
            inner, outer = (self._transform(places, length, cpu) for length in lengths)
            self._lane_patterns[places] = Pattern(places, inner, outer)
        return self._lane_patterns[places]

    def sources_of(self, name: Name) -> Sources:
        return self._sources.setdefault(name, Sources())


class _StandingSpectral(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeSpectral) -> None:
        self._operator, self._adapters = operator, dict[int, _Prepared]()
        self._transforms: dict[Name, _StandingTransform] = {}
        self._joined: tuple[list[Bound], JoinedSums] | None = None

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared
        for name, own in prepared.own.items():
            if name not in self._transforms:
                self._transforms[name] = _StandingTransform(self._operator, name)
            self._transforms[name].admit(slot, own)

    def dismiss(self, slot: int) -> None:
        for name in self._adapters.pop(slot).own:
            self._transforms[name].dismiss(slot)
            if not self._transforms[name].num_adapters:
                del self._transforms[name]
                self._joined = None

    def bound(self, table: RowTable) -> Bound:
        adapters = {slot: self._adapters[slot] for slot in table.slots if slot in self._adapters}
        others = {slot: own.members for slot, own in adapters.items() if table.is_gated or not own.is_served}
        names = {name: None for slot, own in adapters.items() if slot not in others for name in own.own}
        bounds: list[Bound] = [self._transforms[name].bound(table) for name in names]
        if others:
            plain = SpectralOperator.bind(self._operator, uses_of(others), table)
            return JoinedSums([*bounds, plain]) if bounds else plain
        if len(bounds) == 1:
            return bounds[0]
        if self._joined is None or self._joined[0] != bounds:
            self._joined = bounds, JoinedSums(bounds)
        return self._joined[1]


class _StandingTransform:
    """Adapters with one transform at one group."""

    def __init__(self, operator: NativeSpectral, name: Name) -> None:
        self._operator, self._name, self._adapters = operator, name, dict[int, _Own]()
        self._values: dict[tuple[int, int], LaneValues] = {}
        """By member and seats, of the table that was bound last."""
        self._bound: BoundSpectral | None = None
        """To that table, or to one before."""

    @property
    def num_adapters(self) -> int:
        return len(self._adapters)

    def admit(self, slot: int, own: _Own) -> None:
        self._adapters[slot] = own

    def dismiss(self, slot: int) -> None:
        del self._adapters[slot]
        for values in self._values.values():
            values.forget(slot)
        if self._bound is not None:  # Whoever still has it keeps nothing of a table.
            self._bound.clear()

    def bound(self, table: RowTable) -> Bound:
        adapters = {slot: self._adapters[slot] for slot in table.slots if slot in self._adapters}
        owns = list(adapters.values())
        most = [max(each) for each in zip(*(own.most for own in owns), strict=True)]
        some = [
            next((p for p in each if p), None)
            for each in zip(*(own.some_places for own in owns), strict=True)
        ]
        batch = self._operator.batch(table, frozenset(adapters), self._name, ROW_BYTES * sum(most))
        bound = self._bound_for(some)
        before, self._values = self._values, {}
        cores = {
            member: [self._core(member, group, adapters, before) for group in batch.groups]
            for member, places in enumerate(some)
            if places is not None
        }
        bound.show(batch, cores, max(most))
        return bound

    def _bound_for(self, places: Sequence[Places | None]) -> BoundSpectral:
        """The last one, where it has the same members. ``places``: some of each that has any."""
        if self._bound is None or not self._bound.serves([own is not None for own in places]):
            if self._bound is not None:
                self._bound.clear()
            known = [own for own in places if own is not None]
            inner = self._operator.lane_transform(known[0], known[0].in_features)
            outer = [
                None if own is None else self._operator.lane_transform(own, own.out_features)
                for own in places
            ]
            self._bound = BoundSpectral(inner, outer, self._operator.sources_of(self._name))
        return self._bound

    def _core(
        self,
        member: int,
        group: Group,
        adapters: Mapping[int, _Own],
        before: Mapping[tuple[int, int], LaneValues],
    ) -> Core:
        mixes = group.mixes if len(group.mixes) > 1 else [*group.mixes] * len(group.rows)
        lanes = [
            (n, mix) for n, (row, mix) in enumerate(zip(group.rows, mixes, strict=True)) if row != NO_ROW
        ]
        acting = {
            mix: tuple((s, w) for s, w in mix if s in adapters and adapters[s].addresses[member])
            for mix in {mix for _, mix in lanes}
        }
        found = {adapters[slot].only_places[member] for mix in acting.values() for slot, _ in mix}
        if not found:
            return Core()

        def values_of(slot: int) -> Tensor | None:
            return adapters[slot].values[member] if slot in adapters else None

        places = _only(found)
        if places is None:
            told = {mix: self._told(member, own, adapters) for mix, own in acting.items()}
            uses = [(lane, *use) for lane, mix in lanes for use in told[mix][0]]
            return Core.of_each(uses, (adapters, told))
        pattern = self._operator.lane_pattern(places)
        if len(group.mixes) == 1:
            values = sum_of_mix(group.mixes[0], values_of)
            assert values is not None, "an adapter that acts here has values"
            return Core.of_all(pattern, values)
        key = member, group.seats
        own = before.get(key)
        if own is None or not own.serves(pattern.order_N, group):
            own = LaneValues(pattern.order_N, group.lanes)
        own.hold(group, values_of)
        self._values[key] = own
        return Core.of_all(pattern, own.values_NL)

    def _told(
        self, member: int, acting: Pairs, adapters: Mapping[int, _Own]
    ) -> tuple[Sequence[Fields], object]:
        """``SpectralUse`` of a row of these, without its lane; and what it has the addresses of."""
        places = _only({adapters[slot].only_places[member] for slot, _ in acting})
        if len(acting) == 1 or places is None:
            each = [(a, weight) for slot, weight in acting for a in adapters[slot].addresses[member]]
            return [(*addresses, weight_bits(weight)) for addresses, weight in each], None
        # As where all rows have the same places: a row's bits are its own.
        values = sum_of_mix(acting, lambda slot: adapters[slot].values[member])
        assert values is not None, "adapters that act here have values"
        return [(self._operator.lane_pattern(places).address, values.data_ptr(), weight_bits(1.0))], values
