"""`LowRank`: ``y += B (A x)``, for rows with different A, B and ranks.

Adapters with many rows (prefill) get two matrix products each. The others (decode: a row or a few each)
are pooled: their A are stacked along the rank, one product shrinks every pooled row against all of them,
a mask of weights keeps each row's own ranks, one product a member expands. Ranks are never padded, mixes
are more than one non-zero in a mask row, and members of a group share the shrink.

Legend: T rows of the batch, N pooled rows, I in, O out, R ranks (R_all: of all pooled parts of all members).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 16
"""From this many rows on, an adapter's own two products cost less than its share of a pool."""


class LowRankOperator(Operator[LowRank]):
    part = LowRank

    def meaning(self, part: LowRank, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=(x_TI @ part.a_RI.T) @ part.b_OR.T)

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        used = [s for s in table.segments if any(s.slot in parts for parts in uses)]
        alone = [s for s in used if len(s.rows_N) >= MIN_ROWS_ALONE]
        pooled = [s for s in used if len(s.rows_N) < MIN_ROWS_ALONE]
        pools = [[segment] for segment in alone] + ([pooled] if pooled else [])
        return _BoundLowRank([_pool(uses, segments, table) for segments in pools])


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Stacked factors of some adapters: ``a_RI`` [R_all, I], for each member its ranks and its B, [R, O]."""

    rows_N: Tensor | None
    a_RI: Tensor
    mask_NR: Tensor
    members: tuple[tuple[slice, Tensor] | None, ...]


def _pool(uses: Uses[LowRank], segments: Sequence[Segment], table: RowTable) -> _Pool:
    rows_N, weights_NS = table.weights(tuple(segment.slot for segment in segments))
    shrinks: list[Tensor] = []
    columns: list[int] = []
    members: list[tuple[slice, Tensor] | None] = []
    for parts_by_slot in uses:
        start, expands = len(columns), []
        for column, segment in enumerate(segments):
            for part in parts_by_slot.get(segment.slot, ()):
                shrinks.append(part.a_RI)
                expands.append(part.b_OR.T)
                columns.extend([column] * part.a_RI.shape[0])
        members.append((slice(start, len(columns)), torch.cat(expands)) if expands else None)
    mask_NR = weights_NS.index_select(1, torch.tensor(columns, device=weights_NS.device))
    return _Pool(rows_N, torch.cat(shrinks), mask_NR, tuple(members))


class _BoundLowRank(Bound):
    def __init__(self, pools: Sequence[_Pool]) -> None:
        self._pools = pools

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        changes: list[list[Change]] = [[] for _ in self._pools[0].members]
        for pool in self._pools:
            x_NI = x_TI if pool.rows_N is None else x_TI[pool.rows_N]
            z_NR = linear(x_NI, pool.a_RI).mul_(pool.mask_NR)
            for member, expand in enumerate(pool.members):
                if expand is not None:
                    ranks, b_RO = expand
                    changes[member].append(Change(z_NR[:, ranks] @ b_RO, pool.rows_N))
        return changes
