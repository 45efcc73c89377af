"""`Spectral` in C++, of the transform `dft`: rows side by side from the first transform to the last.

Adapters whose coefficients sit at the same places, as those of one seed do, differ in their values alone:
their rows go through one pattern together. Where a group of layers has anything else (places of an adapter's
own, another transform, a length with a large prime factor, gates) the plain operator runs.

Legend: T rows of the batch, U rows that use the transform, I in, O out, N coefficients, C coordinates of a
spectrum, L rows side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.native.fourier import MOST_ROWS, NARROW, Plan, Rows, factors_of, most_lanes
from timbre_server.operators.native.uses import BoundKernels, address_of, structures
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import Pairs, RowTable
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.transforms import Transform

ROW_BYTES = 8
"""Of a coefficient in a row's copy: its value, and as much for places beside it where no row is."""


class NativeSpectral(SpectralOperator):
    """`SpectralOperator` by ``spectral.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[int, Plan] = {}
        self._native_patterns: WeakKeyDictionary[Places, _Pattern] = WeakKeyDictionary()
        self._batches: WeakKeyDictionary[RowTable, dict[tuple[frozenset[int], int], _Batch]]
        self._batches = WeakKeyDictionary()
        """By what they follow from: most groups of layers have the same."""

    def bind(self, uses: Uses[Spectral], table: RowTable) -> Bound:
        places = [_only_places(parts_by_slot) for parts_by_slot in uses]
        known = [each for each in places if each is not None]
        served = all(own is not None for own, parts in zip(places, uses, strict=True) if parts)
        if table.is_gated or not served or not all(map(_is_served, known)):
            return super().bind(uses, table)
        bytes_per_row = sum(ROW_BYTES * each.rows_N.numel() for each in known)
        slots = frozenset(slot for parts_by_slot in uses for slot in parts_by_slot)
        batches = self._batches.setdefault(table, {})
        if (slots, bytes_per_row) not in batches:
            batches[slots, bytes_per_row] = _Batch.of(table, slots, bytes_per_row)
        batch = batches[slots, bytes_per_row]
        members = [
            None
            if own is None
            else _Member(batch, parts, self._plan(own.out_features), self._native_pattern(own))
            for own, parts in zip(places, uses, strict=True)
        ]
        return _BoundSpectral(batch, self._plan(known[0].in_features), members)

    def _plan(self, length: int) -> Plan:
        if length not in self._plans:
            self._plans[length] = Plan(length)
        return self._plans[length]

    def _native_pattern(self, places: Places) -> _Pattern:
        """Kept as long as the object of places."""
        if places not in self._native_patterns:
            cpu = torch.device("cpu")
            inner, outer = (
                self._transform(places, n, cpu) for n in (places.in_features, places.out_features)
            )
            self._native_patterns[places] = _Pattern(places, inner, outer)
        return self._native_patterns[places]


def _only_places(parts_by_slot: Mapping[int, Sequence[Spectral]]) -> Places | None:
    """Those that all parts have in common."""
    found = {part.places for parts in parts_by_slot.values() for part in parts}
    return found.pop() if len(found) == 1 else None


def _is_served(places: Places) -> bool:
    lengths = (places.in_features, places.out_features)
    return places.transform == "dft" and all(factors_of(length) is not None for length in lengths)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Rows in groups that one register holds. Those of a group all have one mix, or each its own."""

    groups: ctypes.Array[Rows]
    mixes: tuple[tuple[Pairs, ...], ...]
    """Of each group: the one of all its rows, or one a row."""
    rows_U: Tensor
    num_rows: int

    @property
    def address(self) -> int:
        return ctypes.addressof(self.groups)

    @staticmethod
    def of(table: RowTable, slots: Collection[int], bytes_per_row: int) -> _Batch:
        """Rows beyond the last whole group of a mix are put together with those of others, where there is
        room for a copy of their values."""
        # Wide registers take fewer groups: as many as there are threads, at least.
        lanes = most_lanes() if table.num_rows > NARROW * torch.get_num_threads() else NARROW
        room = PoolRoom()
        groups: list[tuple[list[int], tuple[Pairs, ...]]] = []
        rest: list[tuple[int, Pairs]] = []
        for mix, rows_N in table.by_mix(slots).items():
            rows = rows_N.tolist() if mix else []
            whole = len(rows) // lanes * lanes
            groups += [(rows[start : start + lanes], (mix,)) for start in range(0, whole, lanes)]
            if room.take(bytes_per_row * len(rows[whole:])):
                rest += [(row, mix) for row in rows[whole:]]
            elif rows[whole:]:
                groups.append((rows[whole:], (mix,)))
        for start in range(0, len(rest), lanes):
            rows_L, mixes_L = zip(*rest[start : start + lanes], strict=True)
            distinct = tuple(dict.fromkeys(mixes_L))
            groups.append((list(rows_L), distinct if len(distinct) == 1 else mixes_L))
        found = (Rows * len(groups))(*(Rows.of(rows) for rows, _ in groups))
        rows_U = torch.tensor([row for rows, _ in groups for row in rows], dtype=torch.int64)
        return _Batch(found, tuple(mixes for _, mixes in groups), rows_U, table.num_rows)


class _Core(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("is_shared", ctypes.c_int64)]


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

    def __init__(
        self, batch: _Batch, parts_by_slot: Mapping[int, Sequence[Spectral]], plan: Plan, pattern: _Pattern
    ) -> None:
        known = {
            mixes: _values(mixes, parts_by_slot, pattern.order_N) for mixes in dict.fromkeys(batch.mixes)
        }
        own = [known[mixes] for mixes in batch.mixes]
        self._cores = (_Core * len(own))(
            *(_Core(None if v is None else v.data_ptr(), is_shared) for v, is_shared in own)
        )
        self._held = (plan, pattern, batch, own)
        cores = ctypes.addressof(self._cores)
        self._fields = structures([(plan.address, pattern.address, batch.address, cores, len(own))])
        self._first = address_of(self._fields)
        self._work = len(batch.rows_U) * (2 * len(pattern.order_N) + 8 * plan.length)
        self._run = kernel("timbre_spectral", ADDRESS, ADDRESS, ADDRESS)
        self.rows_N = batch.rows_U
        self.out_features = plan.length

    def add(self, z_GCL: Tensor, y_TO: Tensor) -> None:
        """What was made of x is all that it reads: the spectra of the batch's groups of rows."""
        self._run(self._first, z_GCL.data_ptr(), y_TO.data_ptr(), num_threads(self._work))


def _values(
    mixes: Sequence[Pairs], parts_by_slot: Mapping[int, Sequence[Spectral]], order_N: Tensor
) -> tuple[Tensor | None, bool]:
    """The values of one group of rows, and whether they share them; None where they have none here."""
    each = [_summed(mix, parts_by_slot) for mix in mixes]
    known = [values for values in each if values is not None]
    if len(each) == 1 or not known:
        return each[0], True
    zeros_N = torch.zeros(len(known[0]))
    lanes = [zeros_N if values is None else values for values in each]
    lanes += [zeros_N] * ((NARROW if len(lanes) <= NARROW else MOST_ROWS) - len(lanes))
    return torch.stack(lanes, dim=1)[order_N], False


def _summed(mix: Pairs, parts_by_slot: Mapping[int, Sequence[Spectral]]) -> Tensor | None:
    """``Σ w c`` of one mix; an adapter's own values where it is alone with weight 1."""
    weighted = [(weight, part.c_N) for slot, weight in mix for part in parts_by_slot.get(slot, ())]
    if len(weighted) == 1 and weighted[0][0] == 1:
        return weighted[0][1].contiguous()
    return torch.stack([weight * c_N for weight, c_N in weighted]).sum(0) if weighted else None


class _BoundSpectral(BoundKernels):
    def __init__(self, batch: _Batch, plan: Plan, members: Sequence[_Member | None]) -> None:
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
