"""What the routers of the running step have given: for sites that have none of their own (below a block, of
an adapter with a scout), and for whoever asks after.

Legend: N rows of one adapter, E experts, K gates of several routers, P copies of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from weakref import WeakSet

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


class LastingRouters(ABC):
    """Those at one group of layers that run without telling a step of it."""

    @property
    @abstractmethod
    def called_at(self) -> int:
        """When they ran last, by `StepRouting.clock`."""

    @abstractmethod
    def calls(self) -> Iterable[RouterCall]:
        """What they gave then."""


class StepRouting:
    """Empty between steps."""

    def __init__(self) -> None:
        self._clock = array("q", [0])
        self.clock = self._clock.buffer_info()[0]
        """The address of a number that counts calls of routers."""
        self._began_at = 0
        self._slots: Sequence[int] = ()
        self._acted: dict[int, list[array[int]]] = {}
        self._lasting: WeakSet[LastingRouters] = WeakSet()
        self._noted: list[tuple[int, RouterCall]] = []
        self._chosen: dict[Router, Tensor] = {}
        self._scouted: dict[Scouted, tuple[Tensor, Tensor]] = {}
        self._rows_of_head: dict[RowTable, Tensor] = {}
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
        self._clock[0] += 1
        self._noted.extend((self._clock[0], call) for call in calls)

    def follow(self, routers: LastingRouters) -> None:
        """Ask them, for as long as there are any, what they gave in a step."""
        self._lasting.add(routers)

    def acted(self, slot: int, num_experts: int) -> array[int]:
        """Where `LastingRouters` count on how many rows of an adapter each expert acted in a step."""
        known = self._acted.setdefault(slot, [])
        found = next((counts for counts in known if len(counts) >= num_experts), None)
        if found is None:
            found = array("q", bytes(8 * num_experts))
            known.append(found)
        return found

    @property
    def noted(self) -> list[RouterCall]:
        return [call for _, call in self._noted]

    @property
    def calls(self) -> list[RouterCall]:
        """All of the step, in order."""
        lasting = (own for own in self._lasting if own.called_at > self._began_at)
        found = [*self._noted, *((own.called_at, call) for own in lasting for call in own.calls())]
        return [call for _, call in sorted(found, key=itemgetter(0))]

    def counts(self) -> dict[int, list[int]]:
        """By slot, what `LastingRouters` have counted in the step."""
        each = {slot: self._acted[slot] for slot in self._slots if any(map(any, self._acted.get(slot, ())))}
        return {slot: [sum(of) for of in zip_longest(*own, fillvalue=0)] for slot, own in each.items()}

    def begin(self, slots: Sequence[int]) -> None:
        """A step of rows of these adapters."""
        self._slots = slots
        self.restart()

    def restart(self) -> None:
        """The forward of the step is to run once more: nothing of it has run."""
        self._began_at = self._clock[0]
        self._noted.clear()
        self.rows_of_copies = {}
        for counts in (counts for slot in self._slots for counts in self._acted.get(slot, ())):
            counts[:] = array("q", bytes(8 * len(counts)))

    def repeat(self, calls: Iterable[RouterCall], rows_of_copies: Mapping[RowTable, Tensor]) -> None:
        """The forward was one that gave this."""
        self.restart()
        self.note(calls)
        self.rows_of_copies = dict(rows_of_copies)

    def forget(self, slot: int) -> None:
        """It changes hands."""
        self._acted.pop(slot, None)

    def end_step(self) -> None:
        self.restart()
        self._chosen.clear()
        self._scouted.clear()
        self._rows_of_head.clear()
