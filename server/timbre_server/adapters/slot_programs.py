"""Programs by slot. Those used last have their parts made; all others lie packed (`packed_sites`)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from timbre_methods.program import AdapterProgram

MAX_IDLE_OPEN = 64
"""So many programs beside those of the running step keep their parts: one that is used again soon."""


class SlotPrograms(Mapping[int, AdapterProgram]):
    """What a slot gives stays the very same object from `use` to `use` while it names the slot."""

    def __init__(self) -> None:
        self._programs: dict[int, AdapterProgram] = {}
        self._open: OrderedDict[int, AdapterProgram] = OrderedDict()
        """Used last, last."""
        self._num_used = 0
        """By the last step."""

    def __getitem__(self, slot: int) -> AdapterProgram:
        found = self._open.get(slot)
        if found is None:
            found = self._open[slot] = opened(self._programs[slot])
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._programs)

    def __len__(self) -> int:
        return len(self._programs)

    def put(self, slot: int, program: AdapterProgram) -> None:
        self._programs[slot] = program

    def act_on(self, paths: Set[str], slots: Iterable[int]) -> bool:
        """Whether any of these slots' programs has parts there."""
        return not all(self[slot].sites.keys().isdisjoint(paths) for slot in slots)

    def open(self, slot: int, program: AdapterProgram) -> Sequence[int]:
        """Let a slot give what was `opened` of its program. Those whose parts are no longer kept."""
        self._open[slot] = program
        return self._closed()

    def pop(self, slot: int) -> AdapterProgram:
        """As it was put."""
        self._open.pop(slot, None)
        return self._programs.pop(slot)

    def use(self, slots: Sequence[int]) -> Sequence[int]:
        """A step begins that uses these, and no others. Those whose parts are no longer kept."""
        for slot in slots:
            self._open[slot] = self[slot]
            self._open.move_to_end(slot)
        self._num_used = len(slots)
        return self._closed()

    def _closed(self) -> Sequence[int]:
        num_closed = max(0, len(self._open) - self._num_used - MAX_IDLE_OPEN)
        return [self._open.popitem(last=False)[0] for _ in range(num_closed)]


def opened(program: AdapterProgram) -> AdapterProgram:
    """With its parts made."""
    return replace(program, sites=dict(program.sites))
