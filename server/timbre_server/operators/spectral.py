"""`Spectral`: ``y += Re(Tᵀ (S (T x)))`` in a transform T that adapters share.

The input is transformed once for the whole batch and for every member of the group, whichever adapters use
that transform; the small cores run among its coordinates (a mix adds there), and each member's sums are
transformed back once. Only a core's values are an adapter's own; `transforms` says where they go.

Legend: T rows of the batch, U rows that use one transform, P pooled (row, adapter) pairs, N coefficients,
E entries of one coefficient, I in, O out, C coordinates of a spectrum (of the input or of an output).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.operators.block_diagonal import BlockDiagonal, Csr, csr, pooled_bytes
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.transforms import Transform, transform

MIN_ROWS_ALONE = 8

Name = tuple[str, tuple[float, ...]]
"""A transform of any length: its name, and its filter."""


class SpectralOperator(Operator[Spectral]):
    part = Spectral

    def __init__(self) -> None:
        self._patterns: WeakKeyDictionary[Places, Pattern] = WeakKeyDictionary()
        self._transforms: dict[tuple[Name, int, torch.device], Transform] = {}

    def meaning(self, part: Spectral, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        places, device = part.places, x_TI.device
        inner, outer = (
            transform(places.transform, length, places.low_pass, device).matrix().to(device)
            for length in (places.in_features, places.out_features)
        )
        z_TF = x_TI.to(inner.dtype) @ inner.T
        h_TF = z_TF.new_zeros(len(x_TI), len(outer))
        h_TF.index_add_(1, places.rows_N.to(device), z_TF[:, places.columns_N.to(device)] * part.c_N)
        return Meaning(change_TO=torch.real(h_TF @ outer).to(x_TI.dtype))

    def bind(self, uses: Uses[Spectral], table: RowTable) -> Bound:
        by_name: dict[Name, list[dict[int, list[Spectral]]]] = {}
        for member, parts_by_slot in enumerate(uses):
            for slot in table.slots:
                for part in parts_by_slot.get(slot, ()):
                    own = by_name.setdefault(name_of(part.places), [{} for _ in uses])
                    own[member].setdefault(slot, []).append(part)
        room = PoolRoom()
        bounds = [self._bind_transform(own, table, room) for own in by_name.values()]
        return bounds[0] if len(bounds) == 1 else JoinedSums(bounds)

    def _bind_transform(self, uses: Uses[Spectral], table: RowTable, room: PoolRoom) -> Bound:
        """``uses`` all have the same transform."""
        rows_U, segments = table.compact({slot for parts_by_slot in uses for slot in parts_by_slot})
        num_rows = table.num_rows if rows_U is None else len(rows_U)
        crowd = _Crowd(segments, num_rows, table.is_gated)
        members = [self._bind_member(parts, crowd, room) for parts in uses]
        places = next(part.places for parts in uses for own in parts.values() for part in own)
        return _BoundTransform(rows_U, self._transform(places, places.in_features, table.device), members)

    def _bind_member(
        self, parts_by_slot: Mapping[int, Sequence[Spectral]], crowd: _Crowd, room: PoolRoom
    ) -> _Member | None:
        cores: list[_Alone | _Pool] = []
        pooled: list[tuple[Segment, Pattern, Tensor]] = []
        outer: Transform | None = None
        for segment in crowd.segments:
            for part in parts_by_slot.get(segment.slot, ()):
                device = part.c_N.device
                outer = outer or self._transform(part.places, part.places.out_features, device)
                pattern = self._pattern(part.places, device)
                count = len(segment.rows_N)
                if count < MIN_ROWS_ALONE and room.take(count * pattern.pooled_bytes):
                    pooled.append((segment, pattern, part.c_N))
                else:
                    cores.append(_Alone.of(pattern, segment, part.c_N, room))
        if outer is None:
            return None
        if pooled:
            cores.append(_Pool.of(pooled, crowd))
        return _Member(outer, cores)

    def _pattern(self, places: Places, device: torch.device) -> Pattern:
        """Made once for each object of places, and kept as long as it, on the device of those who use it."""
        pattern = self._patterns.get(places)
        if pattern is None:
            inner = self._transform(places, places.in_features, device)
            outer = self._transform(places, places.out_features, device)
            pattern = self._patterns[places] = Pattern.of(places, inner, outer, device)
        return pattern

    def _transform(self, places: Places, length: int, device: torch.device) -> Transform:
        key = (name_of(places), length, device)
        if key not in self._transforms:
            self._transforms[key] = transform(places.transform, length, places.low_pass, device)
        return self._transforms[key]


@dataclass(frozen=True, slots=True, eq=False)
class _Crowd:
    """Who uses one transform: ``segments`` count rows among the ``num_rows`` that do."""

    segments: Sequence[Segment]
    num_rows: int
    is_gated: bool


def name_of(places: Places) -> Name:
    return places.transform, places.low_pass


@dataclass(slots=True, eq=False)
class Pattern:
    """The pattern of S as a real matrix [C_out, C_in], and how its values follow from c."""

    row_ends: Tensor
    columns: Tensor
    source: Tensor
    factor: Tensor
    shape: tuple[int, int]
    latest: ref[_LaidOut] | None = None
    """What binds share as long as one of them uses it."""

    @staticmethod
    def of(places: Places, inner: Transform, outer: Transform, device: torch.device) -> Pattern:
        columns_NE, in_factor_NE = inner.reads(places.columns_N)
        rows_NE, out_factor_NE = outer.writes(places.rows_N)
        factor = (in_factor_NE * out_factor_NE).flatten()
        rows, columns = rows_NE.flatten(), columns_NE.flatten()
        order = torch.argsort(rows, stable=True)
        shape = (outer.coordinates, inner.coordinates)
        row_ends = torch.searchsorted(rows[order], torch.arange(shape[0] + 1, device=rows.device))
        return Pattern(
            row_ends.to(device, torch.int32),
            columns[order].to(device, torch.int32),
            (order // rows_NE.shape[1]).to(device, torch.int32),
            factor[order].to(device, torch.float32),
            shape,
        )

    def values(self, c_N: Tensor) -> Tensor:
        """The matrix's values, of one adapter or, with leading dimensions, of several."""
        return c_N.index_select(-1, self.source).mul_(self.factor)

    def matrix(self, c_N: Tensor) -> Tensor:
        return csr(self.row_ends, self.columns, self.values(c_N), self.shape)

    @property
    def pooled_bytes(self) -> int:
        """Of one pair."""
        return pooled_bytes(len(self.columns), self.shape)

    def laid_out(self, pairs: int) -> _LaidOut:
        """For so many pairs or more."""
        known = None if self.latest is None else self.latest()
        if known is None or known.pairs < pairs:
            repeated = BlockDiagonal.repeated(self.row_ends, self.columns, pairs, self.shape)
            known = _LaidOut(pairs, *repeated)
            self.latest = ref(known)
        return known


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _LaidOut:
    """A pattern along a diagonal, once for each pair: a prefix is that of fewer pairs."""

    pairs: int
    row_ends: Tensor
    columns: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter by itself: its core, applied to all of its rows at once; made anew each time where there
    is no room to keep it."""

    pattern: Pattern
    segment: Segment
    c_N: Tensor
    kept: Tensor | None

    @staticmethod
    def of(pattern: Pattern, segment: Segment, c_N: Tensor, room: PoolRoom) -> _Alone:
        kept = pattern.matrix(c_N) if room.take(pattern.factor.nbytes) else None
        return _Alone(pattern, segment, c_N, kept)

    def add(self, z_UC: Tensor, h_UC: Tensor) -> None:
        index = self.segment.index
        matrix = self.pattern.matrix(self.c_N) if self.kept is None else self.kept
        h_CN = matrix @ z_UC[index].T.contiguous()
        h_UC[index] += h_CN.T * self.segment.weights_N.unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Adapters with few rows: one core for each (row, adapter) pair, applied together."""

    rows_P: Tensor
    is_every_row: bool
    cores: BlockDiagonal
    laid_out: _LaidOut | None
    """What its indices are a prefix of, for later binds to find."""
    gates_N: Sequence[Tensor] | None
    """What multiplies each pair when it runs, where the table is gated: in the cores it is 1."""

    @staticmethod
    def of(uses: Sequence[tuple[Segment, Pattern, Tensor]], crowd: _Crowd) -> _Pool:
        rows_P = torch.cat([segment.rows_N for segment, _, _ in uses])
        every_row = torch.arange(crowd.num_rows, device=rows_P.device)
        is_every_row = torch.equal(rows_P, every_row) and not crowd.is_gated
        gates_N = [s.weights_N for s, _, _ in uses] if crowd.is_gated else None
        if gates_N is not None:
            uses = [(replace(s, weights_N=torch.ones_like(s.weights_N)), p, c) for s, p, c in uses]
        first = uses[0][1]
        if any(pattern is not first for _, pattern, _ in uses):
            return _Pool(rows_P, is_every_row, _stacked(uses), None, gates_N)
        laid_out = first.laid_out(len(rows_P))
        return _Pool(rows_P, is_every_row, _repeated(uses, laid_out), laid_out, gates_N)

    def add(self, z_UC: Tensor, h_UC: Tensor) -> None:
        z_PC = z_UC[self.rows_P]
        if self.gates_N is not None:
            z_PC = z_PC * torch.cat(list(self.gates_N)).unsqueeze(1)
        h_UC.index_add_(0, self.rows_P, self.cores(z_PC))


def _repeated(uses: Sequence[tuple[Segment, Pattern, Tensor]], laid_out: _LaidOut) -> BlockDiagonal:
    """One pattern for all: only values are made."""
    pattern = uses[0][1]
    weights_P = torch.cat([segment.weights_N for segment, _, _ in uses])
    repeats = torch.tensor([len(segment.rows_N) for segment, _, _ in uses], device=weights_P.device)
    c_PN = torch.stack([c_N for _, _, c_N in uses]).repeat_interleave(repeats, 0) * weights_P.unsqueeze(1)
    values, pairs = pattern.values(c_PN).flatten(), len(weights_P)
    row_ends = laid_out.row_ends[: pairs * pattern.shape[0] + 1]
    columns = laid_out.columns[: pairs * len(pattern.columns)]
    return BlockDiagonal(row_ends, columns, values, pairs=pairs, shape=pattern.shape)


def _stacked(uses: Sequence[tuple[Segment, Pattern, Tensor]]) -> BlockDiagonal:
    """Patterns of their own."""
    blocks = [
        Csr(pattern.row_ends, pattern.columns, pattern.values(c_N) * weight)
        for segment, pattern, c_N in uses
        for weight in segment.weights_N
    ]
    return BlockDiagonal.stacked(blocks, uses[0][1].shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    outer: Transform
    cores: Sequence[_Alone | _Pool]

    def change(self, z_UC: Tensor) -> Tensor:
        """[U, O]: back from the summed spectra."""
        return self.outer.back(self._summed(z_UC))

    def _summed(self, z_UC: Tensor) -> Tensor:
        only = self.cores[0] if len(self.cores) == 1 else None
        if isinstance(only, _Pool) and only.is_every_row:
            return only.cores(z_UC)
        h_UC = z_UC.new_zeros(z_UC.shape[0], self.outer.coordinates)
        for core in self.cores:
            core.add(z_UC, h_UC)
        return h_UC


class _BoundTransform(Bound):
    """All cores of one transform at a group."""

    def __init__(self, rows_U: Tensor | None, inner: Transform, members: Sequence[_Member | None]) -> None:
        self._rows_U = rows_U
        self._inner = inner
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        z_UC = self._inner.forward(x_TI if self._rows_U is None else x_TI[self._rows_U])
        return [
            () if member is None else (Change(member.change(z_UC), self._rows_U),) for member in self._members
        ]
