"""Adapters by digest: what the scheduler and the loop see of them.

The scheduler acquires and releases digests and gets slot numbers. The loop calls `poll` between steps,
the only moment when a loaded adapter enters or an evicted one leaves: no step sees a slot change hands.

One load runs at a time, on a thread of its own, where the adapter is also prepared for the operators. Its
result waits, and so do the wishes behind it, while adapters in use fill the budget; requests for resident
adapters go on meanwhile. It is put off where it would keep a favoured adapter waiting (`residency`). Of those
favoured that can never be in memory together it is remembered so: they are favoured no more, and no load
waits for their request to hear of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from timbre_methods.contract import Sites
from timbre_methods.prompt_contract import Frame
from timbre_server.adapters.adapted_model import AdaptedModel, PreparedProgram
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.residency import Departure, Residency
from timbre_server.errors import AdapterLoadFailed
from timbre_server.native.library import compute_alone

FAILURE_LASTS_S = 5.0
"""For so long a failed load is not tried again; after it a mended store is noticed."""

NO_SLOT = -1
"""Of an adapter that is told to have left without having been there."""

MAX_MISFITS = 64
"""Sets of adapters that are known to be too large together; of more, the first found is forgotten."""

_log = logging.getLogger(__name__)


class Loader(Protocol):
    def load(self, digest: str) -> LoadedAdapter:
        """Raises `AdapterLoadFailed`, and nothing else."""
        ...


MakeLoader = Callable[[Sites, Frame, Sequence[Sequence[str]]], Loader]
"""From the base's layers, what prompts need to know of it, and the paths of layers that are bound together:
what loads adapters for them."""


LoadFailureCode = Literal["adapter_load_failed", "adapter_too_large"]


class LoadFailure(NamedTuple):
    """Why an adapter is not in memory."""

    code: LoadFailureCode
    message: str


@dataclass(frozen=True, slots=True)
class Arrival:
    """A load that has ended: the adapter is resident, or there is a ``failure``."""

    digest: str
    method: str = ""
    prepared_bytes: int = 0
    seconds_by_phase: dict[str, float] = field(default_factory=dict)
    failure: LoadFailure | None = None


class AdapterRuntime:
    """Residency, loads and the adapted model, kept in step with each other."""

    def __init__(
        self,
        model: AdaptedModel,
        loader: Loader,
        budget_bytes: int,
        on_load_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_load_ended`` is called on the load's thread: it may only wake a loop that sleeps."""
        self._model = model
        self._loader = loader
        self._residency = Residency(budget_bytes)
        self._on_load_ended = on_load_ended
        self._failures: dict[str, tuple[float, LoadFailure]] = {}
        self._thread = ThreadPoolExecutor(1, "adapter-load", compute_alone)
        self._loading: tuple[str, Future[tuple[LoadedAdapter, PreparedProgram]]] | None = None
        self._departed: list[Departure] = []
        self._retiring: set[str] = set()
        """To be unloaded when there are no requests for them."""
        self._misfits: dict[frozenset[str], str] = {}
        """Neither an adapter's bytes nor the budget change: what is found is true while no other is held."""

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests in memory, most recently used last."""
        return self._residency.resident

    @property
    def num_resident(self) -> int:
        return self._residency.num_resident

    def is_resident(self, digest: str) -> bool:
        return self._residency.is_resident(digest)

    def last_used(self, count: int) -> tuple[str, ...]:
        """So many digests in memory at most, most recently used last."""
        return self._residency.last_used(count)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Digests that are queued or being loaded, oldest wish first."""
        return self._residency.wanted

    @property
    def resident_bytes(self) -> int:
        """Of adapters, without what is taken beside them."""
        return self._residency.adapter_bytes

    @property
    def budget_bytes(self) -> int:
        return self._residency.budget_bytes

    def try_acquire(self, digest: str) -> int | None:
        """The slot of a resident adapter, whose use is now counted. None: it is wanted, ask again after
        the next `poll`; look at `failure` first."""
        if self.failure(digest) is not None:
            return None
        return self._residency.acquire(digest)

    def release(self, digest: str) -> None:
        """Give one use back."""
        self._leave(self._residency.release(digest))

    def failure(self, digest: str) -> LoadFailure | None:
        """Why the last load of this adapter failed, while that is recent."""
        failed = self._failures.get(digest)
        if failed is None:
            return None
        since, failure = failed
        if time.monotonic() - since < FAILURE_LASTS_S:
            return failure
        del self._failures[digest]
        return None

    def load(self, digest: str) -> None:
        """Want an adapter before anybody asks for it; a new try even after a recent failure."""
        self._failures.pop(digest, None)
        self._residency.want(digest, lasting=True)

    def no_requests(self, digest: str) -> None:
        """No request is left that would use the adapter: what only requests wished for is not loaded."""
        self._residency.no_requests(digest)
        if digest in self._retiring:
            self.unload(digest)

    def favour(self, digests: Iterable[str]) -> None:
        """Load these before others and evict none of them: a request waits until it has them all."""
        self._residency.favour(digests)

    def misfit(self, digests: Iterable[str]) -> str | None:
        """Why these can never be in memory together, once that was found while they were favoured."""
        return self._misfits.get(frozenset(digests))

    def hold(self, digests: Iterable[str], num_bytes: int = 0) -> bool:
        """Say which adapters somebody uses for longer than any request, and how many bytes of the budget are
        taken beside all adapters. False, and nothing said, where no room can be made for these."""
        departures = self._residency.make_room(num_bytes)
        if departures is None:
            return False
        for departure in departures:
            self._leave(departure)
        self._residency.hold(digests, num_bytes)
        self._misfits.clear()  # What was found was found beside what was held.
        return True

    def is_leaving(self, digest: str) -> bool:
        """Whether an adapter in use was unloaded."""
        return digest in self._retiring or self._residency.is_leaving(digest)

    def unload(self, digest: str, *, has_requests: bool = False) -> None:
        """Let an adapter go when its last user has gone; `poll` reports the departure.

        With ``has_requests`` it goes when there are `no_requests`: those that still wait would have it loaded
        again, and then it would stay.
        """
        if has_requests:
            self._retiring.add(digest)
            return
        self._retiring.discard(digest)
        was_resident = self._residency.is_resident(digest)
        self._leave(self._residency.unload(digest))
        if not was_resident:
            self._departed.append(Departure(digest, NO_SLOT, "absent"))

    def poll(self) -> tuple[list[Arrival], list[Departure]]:
        """Place a load that has ended, start the next one, and report both. Never blocks."""
        arrivals = self._finish_load()
        digest = self._residency.next_wish
        if self._loading is None and digest is not None:
            future = self._thread.submit(_loaded, self._loader, self._model, digest)
            future.add_done_callback(lambda _: self._on_load_ended())
            self._loading = digest, future
        departed, self._departed = self._departed, []
        return arrivals, departed

    def close(self) -> None:
        """Stop loading; a load in flight is waited for."""
        self._thread.shutdown(cancel_futures=True)

    def check_integrity(self) -> None:
        self._residency.check_integrity()

    def _finish_load(self) -> list[Arrival]:
        if self._loading is None or not self._loading[1].done():
            return []
        digest, future = self._loading
        if digest not in self._residency.wanted:
            self._loading = None
            return []
        error = future.exception()
        if isinstance(error, AdapterLoadFailed):
            return [self._failed(digest, LoadFailure("adapter_load_failed", str(error)))]
        if error is not None:
            _log.error("the load of adapter %s failed unexpectedly", digest, exc_info=error)
            reason = f"adapter {digest} could not be prepared: {error!r}"
            return [self._failed(digest, LoadFailure("adapter_load_failed", reason))]
        loaded, prepared = future.result()
        prepared_bytes, shared = loaded.prepared_bytes, loaded.shared_bytes
        needed_bytes = self._residency.bytes_with_held(prepared_bytes, shared)
        if needed_bytes > self._residency.budget_bytes:
            reason = _too_large(self._residency, f"adapter {digest} needs {needed_bytes} bytes in memory")
            return [self._failed(digest, LoadFailure("adapter_too_large", reason))]
        departures = self._residency.make_room(prepared_bytes, shared)
        if departures is None:
            together = self._residency.bytes_with_favoured(digest, prepared_bytes, shared)
            if together > self._residency.budget_bytes:
                self._give_up_favoured(together)
                return self._finish_load()
            if self._residency.gives_way(digest):
                self._loading = None
            return []
        for departure in departures:
            self._leave(departure)
        self._model.put(self._residency.place(digest, prepared_bytes, shared), loaded.program, prepared)
        self._loading = None
        return [Arrival(digest, loaded.method, prepared_bytes, loaded.seconds_by_phase)]

    def _give_up_favoured(self, together_bytes: int) -> None:
        given_up = self._residency.give_up_favoured()
        self._misfits[given_up] = _too_large(
            self._residency,
            f"the adapters of this mix need {together_bytes} bytes or more in memory together",
        )
        if len(self._misfits) > MAX_MISFITS:
            del self._misfits[next(iter(self._misfits))]

    def _failed(self, digest: str, failure: LoadFailure) -> Arrival:
        self._loading = None
        self._residency.drop_wish(digest)
        now = time.monotonic()
        recent = {key: each for key, each in self._failures.items() if now - each[0] < FAILURE_LASTS_S}
        self._failures = {**recent, digest: (now, failure)}
        return Arrival(digest, failure=failure)

    def _leave(self, departure: Departure | None) -> None:
        if departure is not None:
            self._model.drop(departure.slot)
            self._departed.append(departure)


def _too_large(residency: Residency, needs: str) -> str:
    held, unpin = (" with what is pinned there", ", or unpin that") if residency.holds else ("", "")
    budget = f"the budget for all adapters is {residency.budget_bytes}"
    return f"{needs}{held}; {budget}: raise --adapter-memory-mib{unpin}"


def _loaded(loader: Loader, model: AdaptedModel, digest: str) -> tuple[LoadedAdapter, PreparedProgram]:
    loaded = loader.load(digest)
    began_s = time.perf_counter()
    prepared = model.prepared(loaded.program)
    loaded.seconds_by_phase["prepare"] = time.perf_counter() - began_s
    return loaded, prepared
