"""`Spectral` in Triton: cuFFT takes the rows of a group to their spectra and each member's back, and what is
between is one launch of `core_sums` for all adapters.

Rows of a decode step and of a prompt, and adapters with places of their own, all run alike. Wavelets, places
that crowd in one frequency, and patterns for which a bind has no room are the twin's.

Legend: as in `timbre_server.operators.spectral`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.transforms import HalfSpectrum
from timbre_server.operators.triton.core_sums import Cores, CoreSums
from timbre_server.operators.triton.launch import addresses, numbers
from timbre_server.operators.triton.row_uses import Pairs

MAX_ENTRIES = 64
MAX_UNEVENNESS = 8
"""So many times the usual number of entries, beyond `MAX_ENTRIES`, may one coordinate have."""

Use = tuple[Segment, Spectral]


class TritonSpectral(SpectralOperator):
    def __init__(self) -> None:
        super().__init__()
        self._sums: dict[HalfSpectrum, CoreSums] = {}
        self._even: WeakKeyDictionary[Places, bool] = WeakKeyDictionary()

    def _bind_transform(self, uses: Uses[Spectral], table: RowTable, room: PoolRoom) -> Bound:
        bound = self._bind_kernels(uses, table, room)
        return super()._bind_transform(uses, table, room) if bound is None else bound

    def _bind_kernels(self, uses: Uses[Spectral], table: RowTable, room: PoolRoom) -> Bound | None:
        rows_U, segments = table.compact({slot for parts_by_slot in uses for slot in parts_by_slot})
        num_rows = table.num_rows if rows_U is None else len(rows_U)
        each = [
            [(segment, part) for segment in segments for part in parts_by_slot.get(segment.slot, ())]
            for parts_by_slot in uses
        ]
        places = next(part.places for own in each for _, part in own)
        inner = self._transform(places, places.in_features, table.device)
        if not isinstance(inner, HalfSpectrum):
            return None
        members: list[_Member | None] = []
        for own in each:
            member = self._member(own, num_rows, table, room) if own else None
            if own and member is None:
                return None
            members.append(member)
        return BoundSpectra(rows_U, inner, members)

    def _sums_of(self, places: Places, device: torch.device) -> CoreSums:
        outer = self._transform(places, places.out_features, device)
        assert isinstance(outer, HalfSpectrum), "one name is one kind of transform, whatever the length"
        if outer not in self._sums:
            self._sums[outer] = CoreSums(outer)
        return self._sums[outer]

    def _is_even(self, places: Places, device: torch.device) -> bool:
        """Whether no coordinate has far more entries than others: a program walks along the most of them."""
        if places not in self._even:
            pattern = self._pattern(places, device)
            most, usual = int(pattern.row_ends.diff().max()), len(pattern.columns) // pattern.shape[0]
            self._even[places] = most <= MAX_ENTRIES + MAX_UNEVENNESS * usual
        return self._even[places]

    def _member(self, own: Sequence[Use], num_rows: int, table: RowTable, room: PoolRoom) -> _Member | None:
        places, device = own[0][1].places, table.device
        distinct = {part.places: self._pattern(part.places, device) for _, part in own}
        patterns = list(distinct.values())
        num_bytes = sum(4 * (len(p.row_ends) + 3 * len(p.columns)) for p in patterns)
        is_even = all(self._is_even(places, device) for places in distinct)
        if not is_even or not room.take(num_bytes):
            return None
        number_of = {places: number for number, places in enumerate(distinct)}
        c_A = [part.c_N.contiguous() for _, part in own]
        entry_starts = accumulate((len(pattern.columns) for pattern in patterns[:-1]), initial=0)
        pairs = Pairs.of([segment for segment, _ in own], num_rows)
        cores = Cores(
            uses=pairs.row_uses(),
            pattern_A=numbers([number_of[part.places] for _, part in own], device),
            c_A=addresses(c_A, device),
            row_ends=torch.cat([p.row_ends + start for p, start in zip(patterns, entry_starts, strict=True)]),
            columns=torch.cat([pattern.columns for pattern in patterns]),
            source=torch.cat([pattern.source for pattern in patterns]),
            factor=torch.cat([pattern.factor for pattern in patterns]),
        )
        return _Member(self._sums_of(places, device), cores, c_A, pairs if table.is_gated else None)


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    sums: CoreSums
    cores: Cores
    kept: Sequence[Tensor]
    """What the cores have addresses of."""
    gated: Pairs | None
    """Where the table is gated, whose weights to read when it runs."""

    def change(self, z_UC: Tensor) -> Tensor:
        cores = self.cores if self.gated is None else self.cores._replace(uses=self.gated.row_uses())
        return self.sums.changes(z_UC, cores)


class BoundSpectra(Bound):
    """All cores of one transform at a group."""

    def __init__(self, rows_U: Tensor | None, inner: HalfSpectrum, members: Sequence[_Member | None]) -> None:
        self._rows_U = rows_U
        self._inner = inner
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        z_UC = self._inner.forward(x_TI if self._rows_U is None else x_TI[self._rows_U])
        return [
            () if member is None else (Change(member.change(z_UC), self._rows_U),) for member in self._members
        ]
