"""`LowRank` in Triton: ``y += Σ w · B (A x)``, two launches for all adapters, ranks and members of a group.

Shrink: a program has up to 64 rows of the same adapters and up to 32 of their ranks; where rows are few, one
row, 16 ranks and 512 inputs, and the pieces of z are added in order by who reads them. Expand: the same rows,
one member and 64 of its outputs, over all factors that the rows have there. Mixes are rows with several
factors. No factor is copied or padded, no atomics are used, and an output is written once.

Checked under Triton's interpreter and on an H200.

Legend: T rows of the batch, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.low_rank import BoundGated, Gating, LowRankOperator
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton.launch import Precision
from timbre_server.operators.triton.low_rank_changes import add_low_rank_changes
from timbre_server.operators.triton.low_rank_groups import Factor, LowRankGroups
from timbre_server.operators.triton.routed import BoundExperts


class TritonLowRank(LowRankOperator):
    def __init__(self, precision: Precision = "ieee") -> None:
        self._precision: Precision = precision

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        factors: dict[int, list[Factor]] = {}
        for member, parts_by_slot in enumerate(uses):
            for slot in table.slots:
                own = [Factor(part, member) for part in parts_by_slot.get(slot, ())]
                if own:
                    factors.setdefault(slot, []).extend(own)
        return _BoundLowRank(LowRankGroups(factors, len(uses), table, precision=self._precision))

    def bind_gated(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> BoundGated:
        return BoundExperts(uses, table, gating, self._precision)

    def add_changes(self, parts_S: Sequence[Sequence[LowRank]], delta_SOI: Tensor) -> None:
        add_low_rank_changes(parts_S, delta_SOI)


class _BoundLowRank(Bound):
    def __init__(self, groups: LowRankGroups) -> None:
        self._groups = groups

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return self._groups.sums(x_TI)
