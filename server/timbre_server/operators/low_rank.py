"""`LowRank`: ``y += B (A x)``, for rows with different A, B and ranks.

An adapter with several rows, or without room for a copy, gets two matrix products of its own. The others
(decode: a row or two each) run in batched products, one batch for each rank and number of rows that occurs:
ranks are never padded, and a mix is more than one adapter of a row. Members of a group share the shrink,
their A stacked. `routed` runs the same with a gate for each row and rank. What is stacked at each bind is a
view where it lies so in memory (A where `side_by_side` has put it), else a copy.

Legend: T rows of the batch, N rows of one adapter, P rows of all adapters of a batch, S adapters of a batch
with M rows each, I in, O out, R ranks of one adapter at all members of the group together, K gates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import LowRank
from timbre_server.native.formats import narrowed_rows
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
"""From this many rows on, two products of its own read an adapter's factors once instead of once a row."""


@dataclass(frozen=True, slots=True, eq=False)
class Gating:
    """How the gates of adapters' rows, [N, K] by slot, multiply what these have between shrink and expand."""

    columns: Mapping[int, Sequence[int]]
    """For each rank of an adapter, at all members together: the column of its gate."""
    num_columns: Mapping[int, int]
    num_kept: Mapping[int, int]
    """How many of an adapter's gates are not zero for one row, at most."""


class BoundGated(ABC):
    """As `Bound`, for gates that each run has anew."""

    @abstractmethod
    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        """As `Bound.sums`. ``gates``: those of a slot's rows, in the order of its segment."""


class LowRankOperator(Operator[LowRank]):
    part = LowRank

    def meaning(self, part: LowRank, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=(x_TI @ part.a_RI.to(x_TI.dtype).T) @ part.b_OR.to(x_TI.dtype).T)

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return _BoundLowRank(len(uses), _blocks(uses, table))

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        """`bind`, for experts."""
        return _BoundGated(len(uses), _blocks(uses, table, lambda slot: tuple(gating.columns[slot])), gating)


def _blocks(
    uses: Uses[LowRank], table: RowTable, kind_of: Callable[[int], Hashable] = lambda slot: None
) -> list[_Alone | _Stacked]:
    """All rows and factors in blocks; adapters of one block are of one kind, by slot."""
    room = PoolRoom()
    alone: list[_Alone] = []
    stacked: dict[Hashable, list[tuple[Segment, _Factors]]] = {}
    for segment in table.segments:
        factors = _factors(uses, segment.slot)
        if factors is None:
            continue
        count = len(segment.rows_N)
        if count < MIN_ROWS_ALONE and room.take(factors.stacked_bytes):
            kind = count, factors.ranks, kind_of(segment.slot)
            stacked.setdefault(kind, []).append((segment, factors))
        else:
            alone.append(_Alone(segment, factors))
    return [*alone, *(_Stacked.of(own, table) for own in stacked.values())]


@dataclass(frozen=True, slots=True, eq=False)
class _Factors:
    """One adapter at a group: the A of all members stacked, and each member's B, [R_member, O] or None."""

    a_RI: Tensor
    b_RO: tuple[Tensor | None, ...]
    ranks: tuple[int, ...]

    @property
    def stacked_bytes(self) -> int:
        """Of a copy in float32."""
        return 4 * (self.a_RI.numel() + sum(b.numel() for b in self.b_RO if b is not None))

    def expand(self, z_NR: Tensor) -> list[Tensor | None]:
        """Each member's own ranks through its own B; works on a batch of adapters as well."""
        pieces = z_NR.split_with_sizes(self.ranks, -1)
        return [None if b is None else z @ b.float() for z, b in zip(pieces, self.b_RO, strict=True)]


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
    """All rows of the blocks: a view where they lie one after the other in one storage, else a copy."""
    first, end = blocks[0], blocks[0].storage_offset()
    if len(blocks) == 1:
        return first
    for block in blocks:
        is_next = (
            block.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and block.storage_offset() == end
            and block.is_contiguous()
        )
        if not is_next:
            return torch.cat(list(blocks))
        end += block.numel()
    num_rows = sum(len(block) for block in blocks)
    return first.as_strided((num_rows, first.shape[1]), (first.shape[1], 1))


def side_by_side(
    members: Sequence[Sequence[LowRank]],
    device: torch.device,
    move: Callable[[Tensor], Tensor],
    rounded_to: torch.dtype | None = None,
) -> list[list[LowRank]]:
    """Copies on a device of the parts of one adapter at a group's members, in storage of exactly their size:
    all A in one, each B in its own, as kernels read them, on a CPU rank by rank; `narrowed` each. ``move``
    puts a tensor there, or leaves it."""
    parts = [part for own in members for part in own]
    own_RI = [part.a_RI for part in parts]
    a_RI = move(narrowed_rows(own_RI, rounded_to))
    shrinks = iter(a_RI.split_with_sizes([each.shape[0] for each in own_RI]))
    is_by_rank = device.type == "cpu"

    def copied(b_OR: Tensor) -> Tensor:
        there = move(narrowed_rows([b_OR.T if is_by_rank else b_OR], rounded_to))
        return there.T if is_by_rank else there

    return [[LowRank(next(shrinks), copied(part.b_OR)) for part in own] for own in members]


def _stacked(blocks: Sequence[Tensor]) -> Tensor:
    """float32: it is read again in every step of the bind."""
    return (blocks[0].unsqueeze(0) if len(blocks) == 1 else torch.stack(list(blocks))).float()


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter by itself."""

    segment: Segment
    factors: _Factors

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (self.segment,)

    def changes(self, x_TI: Tensor, gates_NR: Tensor | None = None) -> list[Change | None]:
        """Of each member. ``gates_NR`` multiply what the rows have after the shrink, in stacked order."""
        index = self.segment.index
        z_NR = linear(x_TI[index], self.factors.a_RI.float()) * self.segment.weights_N.unsqueeze(1)
        if gates_NR is not None:
            z_NR = z_NR * gates_NR
        return [None if y is None else Change(y, index) for y in self.factors.expand(z_NR)]


@dataclass(frozen=True, slots=True, eq=False)
class _Stacked:
    """Adapters of equal ranks with as many rows each, few: their factors stacked."""

    segments: tuple[Segment, ...]
    rows_P: Tensor
    is_whole_batch: bool
    weights_SM1: Tensor
    factors: _Factors

    @staticmethod
    def of(own: Sequence[tuple[Segment, _Factors]], table: RowTable) -> _Stacked:
        segments, each = zip(*own, strict=True)
        rows_P = torch.cat([segment.rows_N for segment in segments])
        every_row = torch.arange(table.num_rows, device=rows_P.device)
        members = zip(*(factors.b_RO for factors in each), strict=True)
        stacked = _Factors(
            _stacked([factors.a_RI for factors in each]),
            tuple(
                _stacked([b for b in of_member if b is not None]) if of_member[0] is not None else None
                for of_member in members
            ),
            each[0].ranks,
        )
        weights_SM1 = torch.stack([segment.weights_N for segment in segments]).unsqueeze(2)
        return _Stacked(segments, rows_P, torch.equal(rows_P, every_row), weights_SM1, stacked)

    def changes(self, x_TI: Tensor, gates_PR: Tensor | None = None) -> list[Change | None]:
        """As `_Alone.changes`; rows in the order of the segments."""
        num_adapters, num_rows, _ = self.weights_SM1.shape
        x_SMI = (x_TI if self.is_whole_batch else x_TI[self.rows_P]).view(num_adapters, num_rows, -1)
        z_SMR = torch.bmm(x_SMI, self.factors.a_RI.transpose(1, 2)) * self.weights_SM1
        if gates_PR is not None:
            z_SMR = z_SMR * gates_PR.view_as(z_SMR)
        rows = None if self.is_whole_batch else self.rows_P
        return [None if y is None else Change(y.flatten(0, 1), rows) for y in self.factors.expand(z_SMR)]


class _BoundLowRank(Bound):
    def __init__(self, num_members: int, blocks: Sequence[_Alone | _Stacked]) -> None:
        self._num_members = num_members
        self._blocks = blocks

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return _by_member(self._num_members, [block.changes(x_TI) for block in self._blocks])


class _BoundGated(BoundGated):
    def __init__(self, num_members: int, blocks: Sequence[_Alone | _Stacked], gating: Gating) -> None:
        self._num_members = num_members
        self._blocks = [
            (block, torch.tensor(gating.columns[segment.slot], device=segment.rows_N.device))
            for block in blocks
            for segment in block.segments[:1]
        ]

    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        changes = []
        for block, column_R in self._blocks:
            each_NK = [gates(segment.slot) for segment in block.segments]
            of_block_NK = each_NK[0] if len(each_NK) == 1 else torch.cat(each_NK)
            changes.append(block.changes(x_TI, of_block_NK.index_select(1, column_R)))
        return _by_member(self._num_members, changes)


def _by_member(num_members: int, of_blocks: Sequence[Sequence[Change | None]]) -> list[list[Change]]:
    return [
        [change for of_block in of_blocks if (change := of_block[member]) is not None]
        for member in range(num_members)
    ]
