"""The adapters of one request, all or none: digests and slot numbers, nothing of what an adapter is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from timbre_server.engine.sequence import AdapterSlots, Sequence


class AdapterSlotsSource(Protocol):
    """Where adapters in memory come from. A slot acquired n times stays valid until released n times."""

    def try_acquire(self, digest: str) -> int | None:
        """The adapter's slot; None while it is loading or finds no room: ask again next step."""
        ...

    def release(self, digest: str) -> None: ...

    def failure(self, digest: str) -> tuple[str, str] | None:
        """Why the adapter cannot be had, as an event's error code and message, where its loading failed."""
        ...

    def no_requests(self, digest: str) -> None:
        """The last request that would use the adapter has ended: what it asked for need not be loaded."""
        ...

    def favour(self, digests: Iterable[str]) -> None:
        """Load these before others and keep them, instead of those named before."""
        ...

    def misfit(self, digests: Iterable[str]) -> str | None:
        """Why these can never be in memory together, where that was found while they were favoured."""
        ...


class MixSlots:
    """Acquires and releases whole mixes, and remembers within a step what was not to be had.

    The oldest request that waits for its mix is favoured until it has it or ends. So of several whose mixes
    do not fit into memory together, one always gets on.
    """

    def __init__(self, source: AdapterSlotsSource) -> None:
        self._source = source
        self._missing: dict[str, None] = {}
        self._num_requests: Counter[str] = Counter()
        self._favoured: Sequence | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """Digests asked for in vain since the step began, in the order of asking."""
        return tuple(self._missing)

    def has_requests(self, digest: str) -> bool:
        """Whether a request uses the adapter, or will ask for it."""
        return digest in self._num_requests

    def begin_step(self) -> None:
        self._missing.clear()

    def enter(self, sequence: Sequence) -> None:
        """A request that will acquire its mix has come."""
        self._num_requests.update(digest for digest, _ in sequence.mix)

    def leave(self, sequence: Sequence) -> None:
        """It has ended, with its mix or without."""
        self._give_back(sequence)
        self._favour_no_more(sequence)
        for digest, _ in sequence.mix:
            self._num_requests[digest] -= 1
            if not self._num_requests[digest]:
                del self._num_requests[digest]
                self._source.no_requests(digest)

    def failure(self, sequence: Sequence) -> tuple[str, str] | None:
        """Why the sequence can never have its adapters, as of one adapter; None where it may."""
        misfit = self._source.misfit(digest for digest, _ in sequence.mix)
        if misfit is not None:
            return "mix_not_served", misfit
        failures = (self._source.failure(digest) for digest, _ in sequence.mix)
        return next((failure for failure in failures if failure is not None), None)

    def acquire(self, sequence: Sequence) -> bool:
        """Set ``adapter_slots``; without all of them False, nothing held, every missing one asked for (so
        that they load together)."""
        slots: AdapterSlots = ()
        is_complete = True
        for digest, weight in sequence.mix:
            slot = None if digest in self._missing else self._source.try_acquire(digest)
            if slot is None:
                self._missing[digest] = None
                is_complete = False
            elif is_complete:
                slots += ((slot, weight),)
            else:
                self._source.release(digest)
        if not is_complete:
            for digest, _ in sequence.mix[: len(slots)]:
                self._source.release(digest)
            self._favour(sequence)
            return False
        sequence.adapter_slots = slots
        self._favour_no_more(sequence)
        return True

    def release(self, sequence: Sequence) -> None:
        """The sequence waits again."""
        self._give_back(sequence)
        self._favour(sequence)

    def _favour(self, sequence: Sequence) -> None:
        if sequence.mix and (self._favoured is None or sequence.arrival < self._favoured.arrival):
            self._favoured = sequence
            self._source.favour([digest for digest, _ in sequence.mix])

    def _favour_no_more(self, sequence: Sequence) -> None:
        if sequence is self._favoured:
            self._favoured = None
            self._source.favour(())

    def _give_back(self, sequence: Sequence) -> None:
        for digest, _ in sequence.mix[: len(sequence.adapter_slots)]:
            self._source.release(digest)
        sequence.adapter_slots = ()
