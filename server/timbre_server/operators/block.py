"""`Block`: a dense block on some input channels, ``y += S x[index]``, or output ones, ``y[index] += S x``.

An adapter with several rows, or with a block too large to be worth copying or for the room that is left,
gets one product of its own. Small blocks of equal shape run as (row, adapter) pairs in one batched product.

Legend: T rows of the batch, P pairs, I in, O out, N channels of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Block
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
MAX_POOLED_VALUES = 65_536
"""Values of a block up to which a copy of it a row costs less than a product of its own."""


class BlockOperator(Operator[Block]):
    part = Block

    def meaning(self, part: Block, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        if part.side == "input":
            return Meaning(change_TO=x_TI[:, part.index_N] @ part.block.T)
        change_TO = x_TI.new_zeros(y_TO.shape)
        change_TO[:, part.index_N] = x_TI @ part.block.T
        return Meaning(change_TO=change_TO)

    def bind(self, uses: Uses[Block], table: RowTable) -> Bound:
        room = PoolRoom()
        return _BoundBlock([_bind_member(parts, table, room) for parts in uses])


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    segment: Segment
    part: Block

    def change(self, x_TI: Tensor) -> Change:
        index, part = self.segment.index, self.part
        x_NI = x_TI[index]
        z = linear(x_NI[:, part.index_N] if part.side == "input" else x_NI, part.block)
        z = z * self.segment.weights_N.unsqueeze(1)
        if part.side == "output":
            z = z.new_zeros(len(z), part.out_features).index_copy_(1, part.index_N, z)
        return Change(z, index)


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Blocks of equal shape, stacked once for each row that uses them; ``first`` is one of them."""

    first: Block
    rows_P: Tensor
    weights_P1: Tensor
    index_PN: Tensor
    blocks: Tensor

    @staticmethod
    def of(pairs: Sequence[tuple[Segment, Block]]) -> _Pool:
        each = [part for segment, part in pairs for _ in range(len(segment.rows_N))]
        return _Pool(
            each[0],
            torch.cat([segment.rows_N for segment, _ in pairs]),
            torch.cat([segment.weights_N for segment, _ in pairs]).unsqueeze(1),
            torch.stack([part.index_N for part in each]),
            torch.stack([part.block for part in each]),
        )

    def change(self, x_TI: Tensor) -> Change:
        x = x_TI[self.rows_P]
        if self.first.side == "input":
            x = x.gather(1, self.index_PN)
        z = torch.bmm(x.unsqueeze(1), self.blocks.transpose(1, 2)).squeeze(1) * self.weights_P1
        if self.first.side == "output":
            z = z.new_zeros(len(z), self.first.out_features).scatter_(1, self.index_PN, z)
        return Change(z, self.rows_P)


def _bind_member(
    parts_by_slot: Mapping[int, Sequence[Block]], table: RowTable, room: PoolRoom
) -> list[_Alone | _Pool]:
    bound: list[_Alone | _Pool] = []
    pooled: dict[tuple[str, tuple[int, ...]], list[tuple[Segment, Block]]] = {}
    for segment in table.segments:
        for part in parts_by_slot.get(segment.slot, ()):
            count = len(segment.rows_N)
            is_small = count < MIN_ROWS_ALONE and part.block.numel() <= MAX_POOLED_VALUES
            if is_small and room.take(count * (part.block.nbytes + part.index_N.nbytes)):
                pooled.setdefault((part.side, tuple(part.block.shape)), []).append((segment, part))
            else:
                bound.append(_Alone(segment, part))
    return bound + [_Pool.of(pairs) for pairs in pooled.values()]


class _BoundBlock(Bound):
    def __init__(self, members: Sequence[Sequence[_Alone | _Pool]]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return [[bound.change(x_TI) for bound in member] for member in self._members]
