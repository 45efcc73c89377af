"""Experts of low rank in Triton, for `Routed`: ``y += Σ w · g_e(x) · B_e (A_e x)`` over the experts of a row.

The kernels of `low_rank_kernels`, in which an expert is a factor with a gate. The gate of each row multiplies
between shrink and expand; programs read no rank and no factor of an expert whose gate is zero for all of
their rows. A decode row so reads exactly its own top k. Nothing is sorted: rows of one adapter share tiles
while at least a quarter of its experts act on each, when a tile reads most of them anyway, and go by the row
where fewer do. What a row takes is read on the device, in the order of experts: no answer waits for the host,
and none depends on a race.

The gates themselves, and experts of other kinds, are as in `timbre_server.operators.routed`.

Checked under Triton's interpreter and on an H200.

Legend: T rows of the batch, N rows of one adapter, I in, K gates of one adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Change, Uses
from timbre_server.operators.low_rank import BoundGated, Gating
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton.launch import Precision
from timbre_server.operators.triton.low_rank_groups import Factor, GateRows, LowRankGroups

EXPERTS_BY_ROW = 4
"""With so many experts for each that acts on a row, rows do not share tiles."""


class BoundExperts(BoundGated):
    """All experts of low rank at one group, ready for one table."""

    def __init__(self, uses: Uses[LowRank], table: RowTable, gating: Gating, precision: Precision) -> None:
        starts: dict[int, int] = {}
        start = 0
        for segment in table.segments:
            if segment.slot in gating.columns:
                starts[segment.slot] = start
                start += len(segment.rows_N) * gating.num_columns[segment.slot]
        by_row = {s for s in starts if gating.num_columns[s] >= EXPERTS_BY_ROW * gating.num_kept[s]}
        self._slots = tuple(starts)
        self._groups = LowRankGroups(
            {slot: _factors(uses, slot, gating.columns[slot]) for slot in starts},
            len(uses),
            table,
            GateRows(starts, gating.num_columns, by_row),
            precision,
        )

    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        return self._groups.sums(x_TI, torch.cat([gates(slot).reshape(-1) for slot in self._slots]))


def _factors(uses: Uses[LowRank], slot: int, columns: Sequence[int]) -> list[Factor]:
    """Of one adapter, in the order in which ``columns`` counts its ranks."""
    found: list[Factor] = []
    first_rank = 0
    for member, parts_by_slot in enumerate(uses):
        for part in parts_by_slot.get(slot, ()):
            found.append(Factor(part, member, columns[first_rank]))
            first_rank += len(part.a_RI)
    return found
