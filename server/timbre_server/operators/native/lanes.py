"""Rows side by side in the lanes of registers, and the values of those that have their own, in the same ones.

Rows that come and go leave all others in their lanes, so that a new table costs copies of the values of those
that came, and no others.

Legend: U rows that use the transform, N coefficients, L lanes of a register.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, kernel
from timbre_server.operators.native.fourier import MOST_ROWS, NARROW, most_lanes
from timbre_server.operators.native.structures import address_of, structures
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import Pairs, RowTable

NO_ROW = -1

ValuesOf = Callable[[int], Tensor | None]
"""By slot: the values of an adapter, [N]; None where it has none."""


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of one register."""

    rows: Sequence[int]
    """Of each lane; `NO_ROW` where there is none."""
    mixes: Sequence[Pairs]
    """The one of all rows, or one a lane."""
    seats: int = 0
    """Of lanes that rows of several mixes share: how many there are before."""

    @property
    def lanes(self) -> int:
        return NARROW if len(self.rows) <= NARROW else MOST_ROWS

    @cached_property
    def taken(self) -> Sequence[tuple[int, Pairs]]:
        """The lanes with a row, each with its mix."""
        mixes = self.mixes if len(self.mixes) > 1 else [*self.mixes] * len(self.rows)
        return [(n, mix) for n, (row, mix) in enumerate(zip(self.rows, mixes, strict=True)) if row != NO_ROW]

    @cached_property
    def kind(self) -> Hashable:
        """Equal where mixes are the same in the same lanes."""
        return self.seats, *self.taken

    @cached_property
    def slots(self) -> Collection[int]:
        """Of the adapters of these rows."""
        return {slot for mix in {mix for _, mix in self.taken} for slot, _ in mix}

    @property
    def fields(self) -> tuple[int, ...]:
        """``SpectralRows`` of ``spectrum.h``."""
        return *self.rows, *[NO_ROW] * (MOST_ROWS - len(self.rows)), len(self.rows)


class Batch:
    """All rows of a table in groups."""

    def __init__(self, groups: Sequence[Group], seats: Sequence[Pairs]) -> None:
        self.groups = tuple(groups)
        kinds = {group.kind: group for group in groups}
        self.kinds = tuple(kinds.values())
        """One group of each kind: a prompt has many that are alike."""
        numbers = {kind: n for n, kind in enumerate(kinds)}
        self.kind_of = [numbers[group.kind] for group in groups]
        """Of each group: which of these."""
        self.seats = seats
        """Of each lane that rows of several mixes share: the mix that is there, or was there last."""
        self._structures = structures([group.fields for group in groups])
        self.address = address_of(self._structures)
        rows = [row for group in groups for row in group.rows if row != NO_ROW]
        self.rows_U, self.num_rows = torch.tensor(rows, dtype=torch.int64), len(rows)

    @staticmethod
    def of(table: RowTable, slots: Collection[int], bytes_per_row: int, seats: Sequence[Pairs]) -> Batch:
        """Rows beyond the last whole group of a mix are put together with those of others, where there is
        room for a copy of their values: where they were in ``seats``, as far as they were there."""
        # Wide registers take fewer groups: as many as there are threads, at least.
        lanes = most_lanes() if table.num_rows > NARROW * torch.get_num_threads() else NARROW
        room = PoolRoom()
        groups: list[Group] = []
        rest: list[tuple[int, Pairs]] = []
        for mix, rows_N in table.by_mix(slots).items():
            rows = rows_N.tolist() if mix else []
            whole = len(rows) // lanes * lanes
            groups += [Group(rows[start : start + lanes], (mix,)) for start in range(0, whole, lanes)]
            if room.take(bytes_per_row * len(rows[whole:])):
                rest += [(row, mix) for row in rows[whole:]]
            elif rows[whole:]:
                groups.append(Group(rows[whole:], (mix,)))
        whole = len(rest) // lanes * lanes
        last = 0 if whole == len(rest) else NARROW if len(rest) - whole <= NARROW else lanes
        taken, mixes = _seated(rest, seats, whole + last)
        for start in range(0, len(taken), lanes):
            rows = taken[start : start + lanes]
            while rows and rows[-1] == NO_ROW:
                rows.pop()
            own = mixes[start : start + len(rows)]
            distinct = {mix for row, mix in zip(rows, own, strict=True) if row != NO_ROW}
            if rows:
                groups.append(Group(rows, tuple(distinct) if len(distinct) == 1 else own, start))
        return Batch(groups, mixes)


def _seated(
    rest: Sequence[tuple[int, Pairs]], seats: Sequence[Pairs], count: int
) -> tuple[list[int], list[Pairs]]:
    """Of each of so many lanes its row, and the mix that is there or was there last."""
    mixes = [*seats[:count], *[()] * (count - len(seats))]
    rows = [NO_ROW] * count
    places: dict[Pairs, list[int]] = {}
    for seat, mix in enumerate(mixes):
        places.setdefault(mix, []).append(seat)
    came = []
    for row, mix in rest:
        if places.get(mix):
            rows[places[mix].pop(0)] = row
        else:
            came.append((row, mix))
    free = [seat for seat, row in enumerate(rows) if row == NO_ROW]
    for (row, mix), seat in zip(came, free, strict=False):
        rows[seat], mixes[seat] = row, mix
    return rows, mixes


class LaneValues:
    """The values of one group of rows at one layer, in the order that a kernel reads them in."""

    def __init__(self, order_N: Tensor, lanes: int) -> None:
        self._order_N = order_N
        self.values_NL = torch.zeros(len(order_N), lanes)
        self._mixes: list[Pairs | None] = [()] * lanes
        """Whose values are there."""
        self._run = kernel("timbre_spectral_values", ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS)

    def serves(self, order_N: Tensor, group: Group) -> bool:
        """Whether they lie as this order and group need them."""
        return self._order_N is order_N and len(self._mixes) == group.lanes

    def hold(self, group: Group, values_of: ValuesOf) -> None:
        """Copy those that are not there yet."""
        num_lanes = len(self._mixes)
        sources, held = array("q", bytes(8 * num_lanes)), []
        for lane, (row, mix) in enumerate(zip(group.rows, group.mixes, strict=True)):
            if row != NO_ROW and mix != self._mixes[lane]:
                values_N = sum_of_mix(mix, values_of)
                held.append(torch.zeros(len(self._order_N)) if values_N is None else values_N)
                sources[lane], self._mixes[lane] = held[-1].data_ptr(), mix
        if held:
            order_N, values_NL = self._order_N, self.values_NL
            self._run(
                address_of(sources), num_lanes, order_N.data_ptr(), len(order_N), values_NL.data_ptr(), 1
            )

    def forget(self, slot: int) -> None:
        """What is there of it is not its values any more."""
        self._mixes = [
            None if mix is not None and any(slot == other for other, _ in mix) else mix for mix in self._mixes
        ]


def sum_of_mix(mix: Pairs, values_of: ValuesOf) -> Tensor | None:
    """``Σ w c``, [N]; an adapter's own values where it is alone with weight 1; None of none."""
    if len(mix) == 1 and mix[0][1] == 1:
        return values_of(mix[0][0])
    each = [(weight, values_of(slot)) for slot, weight in mix]
    weighted = [weight * c_N for weight, c_N in each if c_N is not None]
    return torch.stack(weighted).sum(0) if weighted else None
