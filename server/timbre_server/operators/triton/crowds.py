"""Rows that use the same adapters, and how kernels are told of them.

A row is in one crowd, whose adapters a program sums one after the other: so each element of an output has one
writer, which writes once, however many adapters a row mixes. Rows of a crowd have weights of their own.

Tables are made on the host, from spans and not from rows, and sent when they are whole.

Legend: T rows of the batch; Q rows of some crowds, crowd after crowd; K adapters of the row that has most of
them; S runs of rows; G members.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from timbre_server.operators.contract import Change
from timbre_server.operators.row_table import RowTable


class Run(NamedTuple):
    """Consecutive rows of one span, with the weight of each of their adapters, and the first row's number
    among all rows of that adapter."""

    first: int
    num_rows: int
    weights: tuple[float, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Crowd:
    """Adapters, and the rows that use just these, increasing."""

    slots: tuple[int, ...]
    runs: list[Run] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(run.num_rows for run in self.runs)

    def tiles(self, height: int) -> Iterator[tuple[int, int]]:
        """The first row of each tile, counted in the crowd, and how many it has."""
        for first in range(0, self.num_rows, height):
            yield first, min(height, self.num_rows - first)


def crowds_of(table: RowTable, slots: Collection[int]) -> list[Crowd]:
    """All rows that use any of these slots."""
    found: dict[tuple[int, ...], Crowd] = {}
    seen = dict.fromkeys(slots, 0)
    start = 0
    for span in table.spans:
        own = sorted(pair for pair in span.pairs if pair[0] in seen)
        if own and span.num_rows:
            key = tuple(slot for slot, _ in own)
            places = tuple(seen[slot] for slot in key)
            run = Run(start, span.num_rows, tuple(weight for _, weight in own), places)
            found.setdefault(key, Crowd(key)).runs.append(run)
            seen.update((slot, seen[slot] + span.num_rows) for slot in key)
        start += span.num_rows
    return list(found.values())


class CrowdRows:
    """``rows_Q`` int32 on the device, and what each row has for each of its adapters."""

    def __init__(self, crowds: Sequence[Crowd], device: torch.device) -> None:
        self._runs = [(crowd.slots, run) for crowd in crowds for run in crowd.runs]
        self._counts_S = torch.tensor([run.num_rows for _, run in self._runs])
        self._device = device
        self.num_rows = int(self._counts_S.sum())
        self.rows_Q = _rows([run for _, run in self._runs]).to(device, torch.int32)
        weights_KQ = self._of_each_row([run.weights for _, run in self._runs], torch.float32)
        self.weights_KQ = weights_KQ.contiguous().to(device)
        """0 beyond a row's last adapter."""

    def numbered(self, starts: Mapping[int, int], steps: Mapping[int, int]) -> Tensor:
        """[K, Q] int32: ``start + step · n``, both of an adapter, for the row that is its n-th."""
        of_first = [
            [starts[slot] + steps[slot] * n for slot, n in zip(slots, run.places, strict=True)]
            for slots, run in self._runs
        ]
        starts_KQ = self._of_each_row(of_first, torch.int64)
        steps_KQ = self._of_each_row(
            [[steps[slot] for slot in slots] for slots, _ in self._runs], torch.int64
        )
        return (starts_KQ + steps_KQ * counts(self._counts_S)).int().contiguous().to(self._device)

    def _of_each_row(self, of_runs: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
        """[K, Q], 0 beyond the last of a row."""
        most = max(len(own) for own in of_runs)
        padded = [[*own, *[0] * (most - len(own))] for own in of_runs]
        return torch.tensor(padded, dtype=dtype).T.repeat_interleave(self._counts_S, 1)


def _rows(runs: Sequence[Run]) -> Tensor:
    """int64, on the host."""
    counts_S = torch.tensor([run.num_rows for run in runs], dtype=torch.int64)
    firsts_S = torch.tensor([run.first for run in runs], dtype=torch.int64)
    return firsts_S.repeat_interleave(counts_S) + counts(counts_S)


def counts(counts_S: Tensor) -> Tensor:
    """From 0 on, anew for each run."""
    begins_S = counts_S.cumsum(0) - counts_S
    return torch.arange(int(counts_S.sum())) - begins_S.repeat_interleave(counts_S)


class Outputs:
    """What a launch adds to all members of a group: one tensor, member after member, of rows in increasing
    order, each element of which is written once."""

    def __init__(self, table: RowTable, slots: Sequence[Collection[int]], widths: Sequence[int]) -> None:
        """``slots`` and ``widths``: which adapters change each member, and its number of outputs."""
        known = {own: _changed(table, own) for own in {frozenset(own) for own in slots}}
        changed = [known[frozenset(own)] for own in slots]
        self._places_GT = torch.stack([is_changed_T.cumsum(0) - 1 for is_changed_T in changed]).clamp_(min=0)
        self._index = [_index(is_changed_T, table.device) for is_changed_T in changed]
        self._shapes = [(int(t.sum()), width) for t, width in zip(changed, widths, strict=True)]
        sizes = [rows * width for rows, width in self._shapes]
        starts = [sum(sizes[:member]) for member in range(len(sizes))]
        self.widest = max(widths)
        self.members_G2 = torch.tensor(list(zip(starts, widths, strict=True)), device=table.device)
        """Where each member begins, and how many outputs it has: int64."""

    def places(self, crowds: Sequence[Crowd]) -> Tensor:
        """[G, Q]: of each row of the crowds, its place among those of each member."""
        rows_Q = _rows([run for crowd in crowds for run in crowd.runs])
        return self._places_GT[:, rows_Q].to(self.members_G2.device, torch.int32)

    def empty(self) -> Tensor:
        size = sum(rows * width for rows, width in self._shapes)
        return torch.empty(size, dtype=torch.float32, device=self.members_G2.device)

    def changes(self, y: Tensor) -> list[list[Change]]:
        """What `sums` gives, of what launches have written."""
        each = y.split_with_sizes([rows * width for rows, width in self._shapes])
        return [
            [Change(y.view(shape), index)] if shape[0] else []
            for y, shape, index in zip(each, self._shapes, self._index, strict=True)
        ]


def _changed(table: RowTable, slots: Collection[int]) -> Tensor:
    is_changed_T = torch.zeros(table.num_rows, dtype=torch.bool)
    is_changed_T[_rows([run for crowd in crowds_of(table, slots) for run in crowd.runs])] = True
    return is_changed_T


def _index(is_changed_T: Tensor, device: torch.device) -> Tensor | slice | None:
    """As in `Change`."""
    rows = is_changed_T.nonzero().squeeze(1)
    if len(rows) == len(is_changed_T):
        return None
    if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows.to(device)
