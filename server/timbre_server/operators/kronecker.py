"""`Kronecker`: ``Y = w1 X w2ᵀ`` on a row read as a matrix.

An adapter with several rows, or without room for copies, gets products of its own. The others (decode: a row
or two each) run as (row, adapter) pairs in batched products, one batch for each member and set of shapes that
occurs.

Legend: T rows of the batch, B rows of one adapter, P pairs, I in, O out; L, M, K, N, R as in
`timbre_methods.program.Kronecker`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.program import Kronecker
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
"""From this many rows on, products of its own read an adapter's matrices once instead of once a row."""


class KroneckerOperator(Operator[Kronecker]):
    part = Kronecker

    def meaning(self, part: Kronecker, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        w2_KN = part.w2_KR if part.w2_RN is None else part.w2_KR @ part.w2_RN
        return Meaning(change_TO=x_TI @ torch.kron(part.w1_LM, w2_KN).T)

    def bind(self, uses: Uses[Kronecker], table: RowTable) -> Bound:
        room = PoolRoom()
        members: list[list[_Alone | _Pairs]] = []
        for parts_by_slot in uses:
            blocks: list[_Alone | _Pairs] = []
            pairs: dict[tuple[torch.Size | None, ...], list[tuple[Segment, Kronecker]]] = {}
            for segment in table.segments:
                for part in parts_by_slot.get(segment.slot, ()):
                    count = len(segment.rows_N)
                    if count < MIN_ROWS_ALONE and room.take(count * _bytes(part)):
                        pairs.setdefault(_shapes(part), []).append((segment, part))
                    else:
                        blocks.append(_Alone(segment, part))
            members.append(blocks + [_Pairs.of(own, table) for own in pairs.values()])
        return _BoundKronecker(members)


def _shapes(part: Kronecker) -> tuple[torch.Size | None, ...]:
    inner = None if part.w2_RN is None else part.w2_RN.shape
    return part.w1_LM.shape, part.w2_KR.shape, inner


def _bytes(part: Kronecker) -> int:
    return part.w1_LM.nbytes + part.w2_KR.nbytes + (0 if part.w2_RN is None else part.w2_RN.nbytes)


def _applied(w1: Tensor, w2_KR: Tensor, w2_RN: Tensor | None, x: Tensor) -> Tensor:
    """``w1 X w2ᵀ`` in the cheapest order; x is [.., M, N], and the matrices may be batched as it is."""
    z = x if w2_RN is None else x @ w2_RN.mT
    (l_size, m_size), k_size, c_size = w1.shape[-2:], w2_KR.shape[-2], z.shape[-1]
    if l_size * c_size * (m_size + k_size) <= m_size * k_size * (c_size + l_size):
        return (w1 @ z) @ w2_KR.mT
    return w1 @ (z @ w2_KR.mT)


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter by itself."""

    segment: Segment
    part: Kronecker

    def change(self, x_TI: Tensor) -> Change:
        part, index = self.part, self.segment.index
        x_BI = x_TI[index] * self.segment.weights_N.unsqueeze(1)
        x_BMN = x_BI.view(len(x_BI), part.w1_LM.shape[1], -1)
        return Change(_applied(part.w1_LM, part.w2_KR, part.w2_RN, x_BMN).flatten(1), index)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Parts of equal shapes with few rows: their matrices stacked, once for each row that uses them."""

    rows_P: Tensor
    is_whole_batch: bool
    w1_PLM: Tensor
    w2_PKR: Tensor
    w2_PRN: Tensor | None

    @staticmethod
    def of(pairs: Sequence[tuple[Segment, Kronecker]], table: RowTable) -> _Pairs:
        each = [part for segment, part in pairs for _ in range(len(segment.rows_N))]
        rows_P = torch.cat([segment.rows_N for segment, _ in pairs])
        weights_P = torch.cat([segment.weights_N for segment, _ in pairs])
        inner = [part.w2_RN for part in each if part.w2_RN is not None]
        return _Pairs(
            rows_P,
            torch.equal(rows_P, torch.arange(table.num_rows, device=rows_P.device)),
            torch.stack([part.w1_LM for part in each]).mul_(weights_P.view(-1, 1, 1)),
            torch.stack([part.w2_KR for part in each]),
            torch.stack(inner) if inner else None,
        )

    def change(self, x_TI: Tensor) -> Change:
        x_PI = x_TI if self.is_whole_batch else x_TI[self.rows_P]
        x_PMN = x_PI.reshape(len(x_PI), self.w1_PLM.shape[2], -1)
        y_PLK = _applied(self.w1_PLM, self.w2_PKR, self.w2_PRN, x_PMN)
        return Change(y_PLK.flatten(1), None if self.is_whole_batch else self.rows_P)


class _BoundKronecker(Bound):
    def __init__(self, members: Sequence[Sequence[_Alone | _Pairs]]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return [[block.change(x_TI) for block in blocks] for blocks in self._members]
