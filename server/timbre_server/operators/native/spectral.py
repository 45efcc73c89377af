"""`Spectral` in C++, of the transform `dft`: rows side by side from the first transform to the last.

Adapters whose coefficients sit at the same places, as those of one seed do, differ in their values alone:
their rows go through one pattern together. Where a group of layers has anything else (places of an adapter's
own, another transform, a length with a large prime factor, gates) the plain operator runs.

Legend: T rows of the batch, U rows that use the transform, I in, O out, N coefficients, C coordinates of a
spectrum, L rows side by side.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.native.notes import current
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.fourier import Plan, factors_of, most_lanes
from timbre_server.operators.native.lanes import Batch, Group, LaneValues, sum_of_mix
from timbre_server.operators.native.uses import BoundKernels, Sources, address_of, structures
from timbre_server.operators.row_table import Pairs, RowTable
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.transforms import Transform

ROW_BYTES = 8
"""Of a coefficient in a row's copy: its value, and as much for places beside it where no row is."""


class _Prepared:
    """One adapter's parts at a group of layers."""

    def __init__(self, members: Members[Spectral]) -> None:
        self.members = members
        self.places = [_only_places(own) for own in members]
        """Of each member; None where it has none, or is not served."""
        pairs = list(zip(self.places, members, strict=True))
        self.is_served = all(places is not None for places, own in pairs if own)
        self.values = [None if places is None else _sum(own) for places, own in pairs]


def _only_places(parts: Sequence[Spectral]) -> Places | None:
    """Those that all parts have in common, where they are served."""
    found = {part.places for part in parts}
    return next(iter(found)) if len(found) == 1 and all(map(_is_served, found)) else None


def _is_served(places: Places) -> bool:
    lengths = (places.in_features, places.out_features)
    return places.transform == "dft" and all(factors_of(length) is not None for length in lengths)


def _sum(parts: Sequence[Spectral]) -> Tensor:
    if len(parts) == 1:
        return parts[0].c_N.contiguous()
    return torch.stack([part.c_N for part in parts]).sum(0)


class NativeSpectral(StandingOperator[Spectral, _Prepared], SpectralOperator):
    """`SpectralOperator` by ``spectral.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[int, Plan] = {}
        self._native_patterns: WeakKeyDictionary[Places, _Pattern] = WeakKeyDictionary()
        self._batches: WeakKeyDictionary[RowTable, dict[tuple[frozenset[int], int], Batch]]
        self._batches = WeakKeyDictionary()
        """By what they follow from: most groups of layers have the same."""
        self._seats: dict[int, Sequence[Pairs]] = {}
        """The last ones, by the bytes of a row."""
        self.sources = Sources()

    def prepared(self, members: Members[Spectral]) -> _Prepared:
        return _Prepared(members)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingSpectral(self)

    def batch(self, table: RowTable, slots: frozenset[int], bytes_per_row: int) -> Batch:
        known = self._batches.setdefault(table, {})
        if (slots, bytes_per_row) not in known:
            found = Batch.of(table, slots, bytes_per_row, self._seats.get(bytes_per_row, ()))
            known[slots, bytes_per_row], self._seats[bytes_per_row] = found, found.seats
        return known[slots, bytes_per_row]

    def plan(self, length: int) -> Plan:
        if length not in self._plans:
            self._plans[length] = Plan(length)
        return self._plans[length]

    def native_pattern(self, places: Places) -> _Pattern:
        """Kept as long as the object of places."""
        if places not in self._native_patterns:
            cpu, lengths = torch.device("cpu"), (places.in_features, places.out_features)
            inner, outer = (self._transform(places, length, cpu) for length in lengths)
            self._native_patterns[places] = _Pattern(places, inner, outer)
        return self._native_patterns[places]


class _StandingSpectral(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeSpectral) -> None:
        self._operator, self._adapters = operator, dict[int, _Prepared]()
        self._values: dict[tuple[int, int], LaneValues] = {}
        """By member and seats, of the table that was bound last."""
        self._bound: _BoundSpectral | None = None
        """To that table, or to one before."""

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared

    def dismiss(self, slot: int) -> None:
        del self._adapters[slot]
        for values in self._values.values():
            values.forget(slot)
        self._clear()
        self._bound = self._bound if self._adapters else None

    def _clear(self) -> None:
        """Let nothing of a table be kept by whoever still has what is bound."""
        if self._bound is not None:
            self._bound.clear()

    def bound(self, table: RowTable) -> Bound:
        operator = self._operator
        adapters = {slot: self._adapters[slot] for slot in table.slots if slot in self._adapters}
        found = [set(each) - {None} for each in zip(*(own.places for own in adapters.values()), strict=True)]
        served = all(prepared.is_served for prepared in adapters.values())
        if table.is_gated or not served or any(len(each) > 1 for each in found):
            uses = uses_of({slot: prepared.members for slot, prepared in adapters.items()})
            return SpectralOperator.bind(operator, uses, table)
        places = tuple(each.pop() if each else None for each in found)
        bytes_per_row = sum(ROW_BYTES * own.rows_N.numel() for own in places if own is not None)
        batch = operator.batch(table, frozenset(adapters), bytes_per_row)
        if self._bound is None or self._bound.places != places:
            self._clear()
            self._bound = _BoundSpectral(operator, places)
        before, self._values = self._values, {}
        cores = {
            member: self._cores(member, own, batch, adapters, before)
            for member, own in enumerate(places)
            if own is not None
        }
        self._bound.show(batch, cores)
        return self._bound

    def _cores(
        self,
        member: int,
        places: Places,
        batch: Batch,
        adapters: Mapping[int, _Prepared],
        before: Mapping[tuple[int, int], LaneValues],
    ) -> Sequence[Tensor | None]:
        """Of each group of the batch, [N] where all rows have the same mix, or [N, L]."""
        pattern = self._operator.native_pattern(places)

        def values_of(slot: int) -> Tensor | None:
            return adapters[slot].values[member] if slot in adapters else None

        def core(group: Group) -> Tensor | None:
            if len(group.mixes) == 1:
                return sum_of_mix(group.mixes[0], values_of)
            key = member, group.seats
            own = before.get(key)
            if own is None or not own.serves(pattern.order_N, group):
                own = LaneValues(pattern.order_N, group.lanes)
            own.hold(group, values_of)
            self._values[key] = own
            return own.values_NL

        return [core(group) for group in batch.groups]


class _PatternStructure(ctypes.Structure):
    """``SpectralPattern`` of ``spectral.cpp``."""

    _fields_ = [
        ("frequencies", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("entries", ctypes.c_void_p),
        ("in_count", ctypes.c_int64),
    ]


class _Pattern:
    """Which frequencies of one half spectrum coefficients add to which of another: ``SpectralFrequency`` and
    ``SpectralEntry`` of ``spectral.cpp``."""

    def __init__(self, places: Places, inner: Transform, outer: Transform) -> None:
        # Of each place the real part's coordinate, and the imaginary one's after it.
        columns, rows = inner.reads(places.columns_N), outer.writes(places.rows_N)
        row_N, column_N = (own.index_NE[:, 0] // 2 for own in (rows, columns))
        counts_K = row_N.bincount(minlength=outer.coordinates // 2)
        row_K = counts_K.argsort(stable=True)
        self.order_N = row_K.argsort()[row_N].argsort(stable=True)
        factor_NE = rows.factor_NE * columns.factor_NE / (2 * places.out_features)
        scale_K = torch.zeros(len(counts_K))
        scale_K[row_N] = factor_NE[:, 0].float()
        self._frequencies_K3 = _fields(row_K, counts_K[row_K], scale_K[row_K])
        entries_N3 = _fields(column_N, torch.arange(len(row_N)), factor_NE.prod(1).sign().float())
        self._entries_N3 = entries_N3[self.order_N]
        self._structure = _PatternStructure(
            self._frequencies_K3.data_ptr(),
            len(row_K),
            self._entries_N3.data_ptr(),
            inner.coordinates // 2,
        )
        self.address = ctypes.addressof(self._structure)


def _fields(first_N: Tensor, second_N: Tensor, third_N: Tensor) -> Tensor:
    """Structures of two integers and a float."""
    return torch.stack([first_N.int(), second_N.int(), third_N.view(torch.int32)], 1)


class _Member:
    """The `Kernel` of one member of a group of layers, for the table that is shown."""

    def __init__(self, plan: Plan, pattern: _Pattern) -> None:
        self._plan, self._pattern = plan, pattern
        self._fields = array("q", bytes(8 * 6))
        self._address = address_of(self._fields)
        self._held: object = None
        self._run = kernel("timbre_spectral", ADDRESS, ADDRESS, ADDRESS)
        self.rows_N = torch.empty(0, dtype=torch.int64)
        self.out_features = plan.length

    def show(self, batch: Batch, cores: Sequence[Tensor | None]) -> None:
        """``cores``: of each group of the batch its values, for ``SpectralCore`` of ``spectral.cpp``."""
        own = structures([(0, 0) if c is None else (c.data_ptr(), c.dim() == 1) for c in cores])
        work = len(batch.rows_U) * (2 * len(self._pattern.order_N) + 8 * self._plan.length)
        lies = self._plan.address, self._pattern.address, batch.address, address_of(own)
        self._fields[:] = array("q", [*lies, len(cores), num_threads(work) == 1])
        self._held, self.rows_N = (batch, cores, own), batch.rows_U

    def clear(self) -> None:
        self._fields[4], self._held = 0, None

    def add(self, z_GCL: Tensor, y_TO: Tensor) -> None:
        """What was made of x is all that it reads: the spectra of the batch's groups of rows."""
        self._run(self._address, z_GCL.data_ptr(), y_TO.data_ptr(), torch.get_num_threads())


class _BoundSpectral(BoundKernels):
    """For one table after another."""

    def __init__(self, operator: NativeSpectral, places: Sequence[Places | None]) -> None:
        self.places = places
        self._sources = operator.sources
        known = [own for own in places if own is not None]
        self._plan = operator.plan(known[0].in_features)
        self._own = {
            member: _Member(operator.plan(own.out_features), operator.native_pattern(own))
            for member, own in enumerate(places)
            if own is not None
        }
        super().__init__([self._own.get(member) for member in range(len(places))])
        self._fields = array("q", bytes(8 * 4))
        self._address = address_of(self._fields)
        self._num_groups = 0
        self._held: object = None
        self._run = kernel("timbre_spectra", ADDRESS, ADDRESS, NUMBER, ADDRESS)

    @property
    def outlasts_tables(self) -> bool:
        return True

    def show(self, batch: Batch, cores: Mapping[int, Sequence[Tensor | None]]) -> None:
        """The rows of a table, and what of `_Member.show` each member has."""
        self._num_groups, self._held = len(batch.groups), batch
        is_small = num_threads(len(batch.rows_U) * 8 * self._plan.length) == 1
        self._fields[:] = array("q", [self._plan.address, batch.address, self._num_groups, is_small])
        for member, own in self._own.items():
            own.show(batch, cores[member])

    def clear(self) -> None:
        """Hold nothing of a table, and do nothing, until the next is shown."""
        self._num_groups = self._fields[2] = 0
        self._held = None
        for own in self._own.values():
            own.clear()

    def source(self, x_TI: Tensor) -> Tensor:
        """Where it is written down, with room for the groups of all tables: a row has one at most."""
        is_narrow = x_TI.dtype is torch.bfloat16
        x_TI = x_TI if is_narrow else x_TI.float()
        num_groups = self._num_groups if current() is None else x_TI.numel() // self._plan.length
        z_GCL = self._sources.empty(num_groups, self._plan.coordinates, most_lanes())
        self._run(self._address, x_TI.data_ptr(), is_narrow, z_GCL.data_ptr(), torch.get_num_threads())
        return z_GCL
