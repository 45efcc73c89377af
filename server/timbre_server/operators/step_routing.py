"""What the routers of the running step have given: for sites that have none of their own (below a block, of
an adapter with a scout), and for whoever asks after.

Legend: N rows of one adapter, E experts, K gates of several routers, P copies of rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.routing import Router, Scouted
from timbre_server.operators.row_table import RowTable, Segment


@dataclass(frozen=True, slots=True, eq=False)
class SegmentRouters:
    """What gives gates to the rows of a segment, which ``table`` counts, at one place."""

    routers: tuple[Router | Scouted, ...]
    sizes: tuple[int, ...]
    """How many experts each has."""
    table: RowTable
    segment: Segment

    @staticmethod
    def of(routers: Iterable[Router | Scouted], table: RowTable, segment: Segment) -> SegmentRouters:
        found = tuple(routers)
        return SegmentRouters(found, tuple(router.num_experts for router in found), table, segment)


RouterCall = tuple[SegmentRouters, Tensor]
"""With the gates ``[N, K]`` that they gave, those of all side by side."""


class StepRouting:
    """Empty between steps."""

    def __init__(self) -> None:
        self._chosen: dict[Router, Tensor] = {}
        self._scouted: dict[Scouted, tuple[Tensor, Tensor]] = {}
        self._rows_of_head: dict[RowTable, Tensor] = {}
        self.calls: list[RouterCall] = []
        self.rows_of_copies: dict[RowTable, Tensor] = {}
        """Of tables that count copies of the step's rows: the row of each, [P]."""

    def choose(self, router: Router, gates_NE: Tensor) -> None:
        """A block has chosen for the sites below it, until `block_ends`; in the order of its adapter's rows
        in the table that holds there."""
        self._chosen[router] = gates_NE

    def scout(self, scouted: Scouted, rows_N: Tensor, gates_NE: Tensor) -> None:
        """A scout has given the gates of its adapter's rows, increasing, until the step ends."""
        self._scouted[scouted] = rows_N, gates_NE

    def keep_rows(self, head_table: RowTable, row_T: Tensor) -> None:
        """Of the table of the rows whose logits are kept, the row of the step of each."""
        self._rows_of_head[head_table] = row_T

    def chosen(self, router: Router | Scouted, table: RowTable, segment: Segment) -> Tensor:
        """``[N, E]`` of a segment of the table that holds where this is asked. Without a block or a scout
        that has chosen, each expert acts: the meaning of a site alone."""
        if isinstance(router, Scouted):
            gates_NE = self._of_scout(router, table, segment)
        else:
            gates_NE = self._chosen.get(router)
        num_rows = len(segment.rows_N)
        if gates_NE is None:
            return segment.weights_N.new_ones(num_rows, router.num_experts)
        assert len(gates_NE) == num_rows, "gates were chosen for other rows than the site has"
        return gates_NE

    def _of_scout(self, scouted: Scouted, table: RowTable, segment: Segment) -> Tensor | None:
        if scouted not in self._scouted:
            return None
        rows_N, gates_NE = self._scouted[scouted]
        row_T = self.rows_of_copies.get(table, self._rows_of_head.get(table))
        if row_T is None:
            return gates_NE
        return gates_NE.index_select(0, torch.searchsorted(rows_N, row_T[segment.rows_N]))

    def block_ends(self) -> None:
        self._chosen.clear()

    def note(self, calls: Iterable[RouterCall]) -> None:
        """Keeps what routers gave until the step ends; nothing is computed."""
        self.calls.extend(calls)

    def end_step(self) -> None:
        self._chosen.clear()
        self._scouted.clear()
        self._rows_of_head.clear()
        self.calls.clear()
        self.rows_of_copies.clear()
