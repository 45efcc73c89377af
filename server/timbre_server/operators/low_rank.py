"""`LowRank`: ``y += B (A x)``, for rows with different A, B and ranks.

An adapter with several rows, or without room for a copy, gets two matrix products of its own. The others
(decode: a row or two each) run in batched products, one batch for each rank and number of rows that occurs:
ranks are never padded, and a mix is more than one adapter of a row. Members of a group share the shrink,
their A stacked. `routed` runs the same blocks with a gate for each row and rank.

Legend: T rows of the batch, N rows of one adapter, P rows of all adapters of a batch, S adapters of a batch
with M rows each, I in, O out, R ranks of one adapter at all members of the group together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
"""From this many rows on, two products of its own read an adapter's factors once instead of once a row."""


class LowRankOperator(Operator[LowRank]):
    part = LowRank

    def meaning(self, part: LowRank, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=(x_TI @ part.a_RI.T) @ part.b_OR.T)

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return _BoundLowRank(len(uses), low_rank_blocks(uses, table))


def low_rank_blocks(
    uses: Uses[LowRank], table: RowTable, kind_of: Callable[[int], Hashable] = lambda slot: None
) -> list[Alone | Stacked]:
    """All rows and factors in blocks; adapters of one block are of one kind, by slot."""
    room = PoolRoom()
    alone: list[Alone] = []
    stacked: dict[Hashable, list[tuple[Segment, _Factors]]] = {}
    for segment in table.segments:
        factors = _factors(uses, segment.slot)
        if factors is None:
            continue
        count = len(segment.rows_N)
        if count < MIN_ROWS_ALONE and room.take(factors.nbytes):
            kind = count, factors.ranks, kind_of(segment.slot)
            stacked.setdefault(kind, []).append((segment, factors))
        else:
            alone.append(Alone(segment, factors))
    return [*alone, *(Stacked.of(own, table) for own in stacked.values())]


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """One adapter at a group: the A of all members stacked, and each member's B, [R_member, O] or None."""

    a_RI: Tensor
    b_RO: tuple[Tensor | None, ...]
    ranks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.a_RI.nbytes + sum(b.nbytes for b in self.b_RO if b is not None)

    def expand(self, z_NR: Tensor) -> list[Tensor | None]:
        """Each member's own ranks through its own B; works on a batch of adapters as well."""
        pieces = z_NR.split_with_sizes(self.ranks, -1)
        return [None if b is None else z @ b for z, b in zip(pieces, self.b_RO, strict=True)]


def _factors(uses: Uses[LowRank], slot: int) -> _Factors | None:
    parts = [parts_by_slot.get(slot, ()) for parts_by_slot in uses]
    shrinks = [part.a_RI for own in parts for part in own]
    if not shrinks:
        return None
    expands = [[part.b_OR.T for part in own] for own in parts]
    return _Factors(
        _joined(shrinks),
        tuple(_joined(own) if own else None for own in expands),
        tuple(sum(b.shape[0] for b in own) for own in expands),
    )


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """One adapter by itself."""

    segment: Segment
    factors: _Factors

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (self.segment,)

    def changes(self, x_TI: Tensor, gates_NR: Tensor | None = None) -> list[Change | None]:
        """Of each member. ``gates_NR`` multiply what the rows have after the shrink, in stacked order."""
        index = self.segment.index
        z_NR = linear(x_TI[index], self.factors.a_RI) * self.segment.weights_N.unsqueeze(1)
        if gates_NR is not None:
            z_NR = z_NR * gates_NR
        return [None if y is None else Change(y, index) for y in self.factors.expand(z_NR)]


@dataclass(frozen=True, slots=True, eq=False)
class Stacked:
    """Adapters of equal ranks with as many rows each, few: their factors stacked."""

    segments: tuple[Segment, ...]
    rows_P: Tensor
    is_whole_batch: bool
    weights_SM1: Tensor
    factors: _Factors

    @staticmethod
    def of(own: Sequence[tuple[Segment, _Factors]], table: RowTable) -> Stacked:
        segments, each = zip(*own, strict=True)
        rows_P = torch.cat([segment.rows_N for segment in segments])
        every_row = torch.arange(table.num_rows, device=rows_P.device)
        members = zip(*(factors.b_RO for factors in each), strict=True)
        stacked = _Factors(
            torch.stack([factors.a_RI for factors in each]),
            tuple(
                torch.stack([b for b in of_member if b is not None]) if of_member[0] is not None else None
                for of_member in members
            ),
            each[0].ranks,
        )
        weights_SM1 = torch.stack([segment.weights_N for segment in segments]).unsqueeze(2)
        return Stacked(segments, rows_P, torch.equal(rows_P, every_row), weights_SM1, stacked)

    def changes(self, x_TI: Tensor, gates_PR: Tensor | None = None) -> list[Change | None]:
        """As `Alone.changes`; rows in the order of the segments."""
        num_adapters, num_rows, _ = self.weights_SM1.shape
        x_SMI = (x_TI if self.is_whole_batch else x_TI[self.rows_P]).view(num_adapters, num_rows, -1)
        z_SMR = torch.bmm(x_SMI, self.factors.a_RI.transpose(1, 2)) * self.weights_SM1
        if gates_PR is not None:
            z_SMR = z_SMR * gates_PR.view_as(z_SMR)
        rows = None if self.is_whole_batch else self.rows_P
        return [None if y is None else Change(y.flatten(0, 1), rows) for y in self.factors.expand(z_SMR)]


class _BoundLowRank(Bound):
    def __init__(self, num_members: int, blocks: Sequence[Alone | Stacked]) -> None:
        self._num_members = num_members
        self._blocks = blocks

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        changes: list[list[Change]] = [[] for _ in range(self._num_members)]
        for block in self._blocks:
            for own, change in zip(changes, block.changes(x_TI), strict=True):
                if change is not None:
                    own.append(change)
        return changes
