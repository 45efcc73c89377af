"""Which uses each row of a launch has: the row table as kernels read it.

A use is one part of one adapter at one member; the rows that have it are its segment's.

Legend: R rows of a launch, A uses, P pairs of a row and a use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timbre_server.operators.contract import PartT, Uses
from timbre_server.operators.row_table import RowTable, Segment


class RowUses(NamedTuple):
    """Row r has the pairs ``starts[r]`` to ``starts[r + 1]``; of each the use, and its weight. The integers
    are int32."""

    starts: Tensor
    use_P: Tensor
    weights_P: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """All pairs of some uses, in the order of rows, and of uses within a row."""

    starts: Tensor
    use_P: Tensor
    order_P: Tensor
    weights: Sequence[Tensor]

    @staticmethod
    def of(segments: Sequence[Segment], num_rows: int) -> Pairs:
        """``segments`` has one for each use; its rows are counted among ``num_rows``."""
        rows_P, use_P = torch.cat([segment.rows_N for segment in segments]), _uses(segments)
        sorted_P, order_P = torch.sort(rows_P, stable=True)
        starts = torch.searchsorted(sorted_P, torch.arange(num_rows + 1, device=rows_P.device))
        return Pairs(starts.int(), use_P[order_P], order_P, [segment.weights_N for segment in segments])

    def row_uses(self) -> RowUses:
        """With the weights that the segments have now."""
        return RowUses(self.starts, self.use_P, torch.cat(list(self.weights))[self.order_P])


def _uses(segments: Sequence[Segment]) -> Tensor:
    device = segments[0].rows_N.device
    counts = [len(segment.rows_N) for segment in segments]
    uses = torch.arange(len(counts), dtype=torch.int32, device=device)
    return uses.repeat_interleave(torch.tensor(counts, device=device), output_size=sum(counts))


def by_row(segments: Sequence[Segment], table: RowTable) -> tuple[Tensor | None, RowUses]:
    """The rows of the table that have uses, None for all, each with all its pairs."""
    rows_R, compact = table.compact({segment.slot for segment in segments})
    moved = {segment.slot: segment for segment in compact}
    num_rows = table.num_rows if rows_R is None else len(rows_R)
    return rows_R, Pairs.of([moved[segment.slot] for segment in segments], num_rows).row_uses()


def apart(segments: Sequence[Segment]) -> tuple[Tensor, RowUses]:
    """Each pair as a row of its own, use after use: the row of the batch that it reads, and its one pair."""
    rows_P = torch.cat([segment.rows_N for segment in segments])
    starts = torch.arange(len(rows_P) + 1, dtype=torch.int32, device=rows_P.device)
    weights_P = torch.cat([segment.weights_N for segment in segments])
    return rows_P, RowUses(starts, _uses(segments), weights_P)


def divided(
    uses: Uses[PartT], table: RowTable, has_kernel: Callable[[PartT, int], bool]
) -> tuple[list[dict[int, list[PartT]]], list[dict[int, list[PartT]]]]:
    """The uses of a table whose part, with so many rows, has a kernel; and all others of it."""
    own: list[dict[int, list[PartT]]] = [{} for _ in uses]
    others: list[dict[int, list[PartT]]] = [{} for _ in uses]
    for segment in table.segments:
        for member, parts_by_slot in enumerate(uses):
            for part in parts_by_slot.get(segment.slot, ()):
                chosen = own if has_kernel(part, len(segment.rows_N)) else others
                chosen[member].setdefault(segment.slot, []).append(part)
    return own, others
