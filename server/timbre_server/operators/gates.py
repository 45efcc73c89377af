"""The gates of all experts at a group of layers, from wherever each adapter has them.

Legend: T rows of the batch, N rows of one adapter, I in, K gates of one adapter at a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from timbre_methods.routing import Routed, Router, Scouted
from timbre_server.operators.contract import Uses
from timbre_server.operators.low_rank import Gating
from timbre_server.operators.router import Routers, side_by_side
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.step_routing import SegmentRouters, StepRouting


class Gates:
    """The gates of all adapters at a group, ``[N, K]`` by slot: their routers side by side."""

    def __init__(
        self, uses: Uses[Routed], table: RowTable, step: StepRouting, routers: type[Routers]
    ) -> None:
        self._step = step
        self._table = table
        self._routers: dict[int, list[tuple[Router | Scouted, Router | None]]] = {}
        """By slot; again where it reads the group's own input."""
        self._first_columns: dict[tuple[int, Router | Scouted], int] = {}
        self.segments = [s for s in table.segments if any(s.slot in parts_by_slot for parts_by_slot in uses)]
        for segment in self.segments:
            column = 0
            for part in (part for own in uses for part in own.get(segment.slot, ())):
                key = segment.slot, part.router
                if key not in self._first_columns:
                    self._first_columns[key] = column
                    column += part.router.num_experts
                    self._routers.setdefault(segment.slot, []).append((part.router, part.own_router))
        own_routers = [(s, own) for s in self.segments if (own := self._own_routers(s))]
        self._bound = routers(own_routers)
        self._partly_chosen = [
            s for s in self.segments if any(own is None for _, own in self._routers[s.slot])
        ]
        """Those for whom a block or a scout chooses, at some members at least."""
        self._asked = [SegmentRouters.of(own, table, segment) for segment, own in own_routers]
        self._by_slot: dict[int, Tensor] = {}

    def _own_routers(self, segment: Segment) -> list[Router]:
        """Those that read the group's input."""
        return [own for _, own in self._routers[segment.slot] if own is not None]

    def first_column(self, slot: int, router: Router | Scouted) -> int:
        return self._first_columns[slot, router]

    def gating(self, columns: Mapping[int, Sequence[int]]) -> Gating:
        """For experts of low rank whose ranks have these columns."""
        routers = {slot: [router for router, _ in self._routers[slot]] for slot in columns}
        return Gating(
            columns,
            {slot: sum(r.num_experts for r in own) for slot, own in routers.items()},
            {slot: sum(r.num_kept for r in own) for slot, own in routers.items()},
        )

    def compute(self, x_TI: Tensor) -> None:
        computed = self._bound.gates(x_TI)
        self._step.note(zip(self._asked, computed, strict=True))
        for asked, own_NK in zip(self._asked, computed, strict=True):
            self._by_slot[asked.segment.slot] = own_NK
        for segment in self._partly_chosen:
            self._by_slot[segment.slot] = self._beside_chosen(segment)

    def _beside_chosen(self, segment: Segment) -> Tensor:
        """What a block or a scout has chosen, and in its place what the segment's own routers gave."""
        own_NK, column = self._by_slot.get(segment.slot), 0
        found: list[Tensor] = []
        for router, own in self._routers[segment.slot]:
            if own is None or own_NK is None:
                found.append(self._step.chosen(router, self._table, segment))
            else:
                found.append(own_NK[:, column : column + own.num_experts])
                column += own.num_experts
        return side_by_side(found)

    def of(self, slot: int) -> Tensor:
        return self._by_slot[slot]
