"""`Spectral` in C++, of the transform `dft`: rows side by side from the first transform to the last.

Adapters whose coefficients sit at the same places, as those of one seed do, differ in their values alone:
their rows go through one pattern together. Where a group of layers has anything else (places of an adapter's
own, another transform, a length with a large prime factor, gates) the plain operator runs.

Legend: T rows of the batch, U rows that use the transform, I in, O out, N coefficients, C coordinates of a
spectrum, L rows side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.fourier import Plan, factors_of, most_lanes
from timbre_server.operators.native.lanes import Batch, Group, LaneValues, sum_of_mix
from timbre_server.operators.native.uses import BoundKernels, address_of, structures
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
            cpu = torch.device("cpu")
            inner, outer = (
                self._transform(places, n, cpu) for n in (places.in_features, places.out_features)
            )
            self._native_patterns[places] = _Pattern(places, inner, outer)
        return self._native_patterns[places]


class _StandingSpectral(Standing[_Prepared]):
    """At one group."""

    def __init__(self, operator: NativeSpectral) -> None:
        self._operator = operator
        self._adapters: dict[int, _Prepared] = {}
        self._values: dict[tuple[int, int], LaneValues] = {}
        """By member and seats, of the table that was bound last."""

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared

    def dismiss(self, slot: int) -> None:
        del self._adapters[slot]
        for values in self._values.values():
            values.forget(slot)

    def bound(self, table: RowTable) -> Bound:
        operator = self._operator
        adapters = {slot: self._adapters[slot] for slot in table.slots if slot in self._adapters}
        of_members = zip(*(prepared.places for prepared in adapters.values()), strict=True)
        found = [set(each) - {None} for each in of_members]
        served = all(prepared.is_served for prepared in adapters.values())
        if table.is_gated or not served or any(len(each) > 1 for each in found):
            uses = uses_of({slot: prepared.members for slot, prepared in adapters.items()})
            return SpectralOperator.bind(operator, uses, table)
        places = {member: each.pop() for member, each in enumerate(found) if each}
        bytes_per_row = sum(ROW_BYTES * own.rows_N.numel() for own in places.values() if own is not None)
        batch = operator.batch(table, frozenset(adapters), bytes_per_row)
        before, self._values = self._values, {}
        members = [
            self._member(member, places[member], batch, adapters, before) if member in places else None
            for member in range(len(found))
        ]
        return _BoundSpectral(batch, operator.plan(next(iter(places.values())).in_features), members)

    def _member(
        self,
        member: int,
        places: Places,
        batch: Batch,
        adapters: Mapping[int, _Prepared],
        before: Mapping[tuple[int, int], LaneValues],
    ) -> _Member:
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

        cores = [core(group) for group in batch.groups]
        return _Member(batch, self._operator.plan(places.out_features), pattern, cores)


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
    """The values of all adapters at one member of a group of layers."""

    def __init__(self, batch: Batch, plan: Plan, pattern: _Pattern, cores: Sequence[Tensor | None]) -> None:
        """``cores``: of each group of the batch, [N] where all rows have the same mix, or [N, L]."""
        self._cores = structures(  # ``SpectralCore`` of ``spectral.cpp``.
            [(0, 0) if core is None else (core.data_ptr(), core.dim() == 1) for core in cores]
        )
        self._held = (plan, pattern, batch, cores)
        own = plan.address, pattern.address, batch.address, address_of(self._cores), len(cores)
        self._fields = structures([own])
        self._first = address_of(self._fields)
        self._work = len(batch.rows_U) * (2 * len(pattern.order_N) + 8 * plan.length)
        self._run = kernel("timbre_spectral", ADDRESS, ADDRESS, ADDRESS)
        self.rows_N = batch.rows_U
        self.out_features = plan.length

    def add(self, z_GCL: Tensor, y_TO: Tensor) -> None:
        """What was made of x is all that it reads: the spectra of the batch's groups of rows."""
        self._run(self._first, z_GCL.data_ptr(), y_TO.data_ptr(), num_threads(self._work))


class _BoundSpectral(BoundKernels):
    def __init__(self, batch: Batch, plan: Plan, members: Sequence[_Member | None]) -> None:
        super().__init__(members)
        self._held = batch, plan
        self._fields = structures([(plan.address, batch.address, len(batch.groups))])
        self._first = address_of(self._fields)
        self._shape = (len(batch.groups), plan.coordinates, most_lanes())
        self._work = len(batch.rows_U) * 8 * plan.length
        self._run = kernel("timbre_spectra", ADDRESS, ADDRESS, NUMBER, ADDRESS)

    def source(self, x_TI: Tensor) -> Tensor:
        is_narrow = x_TI.dtype is torch.bfloat16
        if not is_narrow:
            x_TI = x_TI.float()
        z_GCL = torch.empty(self._shape)
        self._run(self._first, x_TI.data_ptr(), is_narrow, z_GCL.data_ptr(), num_threads(self._work))
        return z_GCL
