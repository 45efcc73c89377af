"""`Sparse`: ``y += S x`` with S in CSR, for rows with different S.

An adapter with many rows, or with a matrix too large to be worth copying or for the room that is left, gets
one sparse product of its own over all its rows; small ones are laid along one block diagonal.

Legend: T rows of the batch, N rows of one adapter, P pooled (row, adapter) pairs, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.program import Sparse
from timbre_server.operators.block_diagonal import BlockDiagonal, Csr, csr, pooled_bytes
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 8
MAX_POOLED_NON_ZEROS = 16_384


class SparseOperator(Operator[Sparse]):
    part = Sparse

    def meaning(self, part: Sparse, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        rows = torch.repeat_interleave(torch.arange(y_TO.shape[1], device=x_TI.device), part.row_ends.diff())
        change_TO = x_TI.new_zeros(x_TI.shape[0], y_TO.shape[1])
        return Meaning(
            change_TO=change_TO.index_add_(1, rows, x_TI[:, part.columns_N.long()] * part.values_N)
        )

    def bind(self, uses: Uses[Sparse], table: RowTable) -> Bound:
        room = PoolRoom()
        return _BoundSparse([_bind_member(parts, table, room) for parts in uses])


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    segment: Segment
    matrix_OI: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Small matrices, one for each pair; ``rows_P`` is None where the pairs are the batch's rows in order."""

    rows_P: Tensor | None
    weights_P1: Tensor
    matrices: BlockDiagonal

    @staticmethod
    def of(pairs: Sequence[tuple[Segment, Sparse]], table: RowTable) -> _Pool:
        rows_P = torch.cat([segment.rows_N for segment, _ in pairs])
        is_whole_batch = torch.equal(rows_P, torch.arange(table.num_rows, device=rows_P.device))
        blocks = [
            Csr(part.row_ends, part.columns_N, part.values_N)
            for segment, part in pairs
            for _ in range(len(segment.rows_N))
        ]
        first = pairs[0][1]
        return _Pool(
            None if is_whole_batch else rows_P,
            torch.cat([segment.weights_N for segment, _ in pairs]).unsqueeze(1),
            BlockDiagonal.stacked(blocks, (len(first.row_ends) - 1, first.in_features)),
        )


def _bind_member(
    parts_by_slot: Mapping[int, Sequence[Sparse]], table: RowTable, room: PoolRoom
) -> list[_Alone | _Pool]:
    bound: list[_Alone | _Pool] = []
    pooled: list[tuple[Segment, Sparse]] = []
    for segment in table.segments:
        for part in parts_by_slot.get(segment.slot, ()):
            count, shape = len(segment.rows_N), (len(part.row_ends) - 1, part.in_features)
            is_small = count < MIN_ROWS_ALONE and len(part.values_N) <= MAX_POOLED_NON_ZEROS
            if is_small and room.take(count * pooled_bytes(len(part.values_N), shape)):
                pooled.append((segment, part))
            else:
                bound.append(_Alone(segment, csr(part.row_ends, part.columns_N, part.values_N, shape)))
    return [*bound, _Pool.of(pooled, table)] if pooled else bound


class _BoundSparse(Bound):
    def __init__(self, members: Sequence[Sequence[_Alone | _Pool]]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return [[_apply(bound, x_TI) for bound in member] for member in self._members]


def _apply(bound: _Alone | _Pool, x_TI: Tensor) -> Change:
    if isinstance(bound, _Pool):
        x_PI = x_TI if bound.rows_P is None else x_TI[bound.rows_P]
        return Change(bound.matrices(x_PI) * bound.weights_P1, bound.rows_P)
    index = bound.segment.index
    y_ON = bound.matrix_OI @ x_TI[index].T.contiguous()
    return Change(y_ON.T * bound.segment.weights_N.unsqueeze(1), index)
