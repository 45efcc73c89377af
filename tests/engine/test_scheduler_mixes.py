"""Mixes that each fit into the adapters' memory, and together do not: nobody reloads for ever."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType

from hypothesis import given, settings
from hypothesis import strategies as st

from timbre_server.adapters.residency import Residency
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.scheduler import Scheduler, SchedulerLimits

SIZES = {name: 1 + index % 3 for index, name in enumerate("abcdefghij")}
MIXES = st.lists(st.sampled_from(sorted(SIZES)), min_size=0, max_size=5, unique=True)


class AdaptersInMemory:
    """Adapters of different sizes under the real residency; one load of ``delay`` turns at a time."""

    def __init__(self, sizes: dict[str, int], budget: int, delay: int = 0) -> None:
        self.residency = Residency(budget)
        self._sizes = sizes
        self._delay = delay
        self._loading: tuple[str, int] | None = None
        self.misfits: set[frozenset[str]] = set()
        self.loads: list[str] = []

    def turn(self) -> None:
        """As the runtime's poll."""
        residency = self.residency
        residency.check_integrity()
        if self._loading is None or self._loading[0] not in residency.wanted:
            wish = residency.next_wish
            self._loading = None if wish is None else (wish, self._delay)
            if wish is not None:
                self.loads.append(wish)
            return
        digest, left = self._loading
        if left:
            self._loading = digest, left - 1
        elif residency.make_room(self._sizes[digest]) is not None:
            residency.place(digest, self._sizes[digest])
            self._loading = None
        elif residency.bytes_with_favoured(digest, self._sizes[digest], {}) > residency.budget_bytes:
            self.misfits.add(residency.give_up_favoured())
        elif residency.gives_way(digest):
            self._loading = None

    def try_acquire(self, digest: str) -> int | None:
        return self.residency.acquire(digest)

    def release(self, digest: str) -> None:
        self.residency.release(digest)

    def failure(self, digest: str) -> tuple[str, str] | None:
        return None

    def no_requests(self, digest: str) -> None:
        self.residency.no_requests(digest)

    def favour(self, digests: Iterable[str]) -> None:
        self.residency.favour(digests)

    def misfit(self, digests: Iterable[str]) -> str | None:
        return "too large" if frozenset(digests) in self.misfits else None


class Crowd:
    """A scheduler over that memory, turned by hand."""

    def __init__(self, stand_ins: ModuleType, adapters: AdaptersInMemory, max_skips: int = 64) -> None:
        limits = SchedulerLimits(4, 16, 100, max_skips=max_skips)
        self._stand_ins = stand_ins
        self._adapters = adapters
        self._scheduler = Scheduler(limits, BlockPool(64, stand_ins.BLOCK_SIZE), adapters)
        self._runner = stand_ins.ScriptedRunner()
        self.ended: list[str] = []

    def submit(self, name: str, mix: Iterable[str], num_tokens: int = 1) -> None:
        pairs = tuple((digest, 0.5) for digest in mix)
        self._scheduler.add(self._stand_ins.a_request(name, mix=pairs, max_tokens=num_tokens))

    def turn(self) -> None:
        self._adapters.turn()
        plan = self._scheduler.schedule()
        if plan.chunks:
            events = self._scheduler.update(plan, self._runner.execute(plan))
        else:
            events = self._scheduler.take_events()
        for event in events:
            if event.finish_reason is not None:
                self.ended.append(
                    event.request_id if event.finish_reason == "length" else str(event.error_code)
                )

    def run(self, max_turns: int) -> None:
        for _ in range(max_turns):
            self.turn()
            if not self._scheduler.has_work:
                return
        raise AssertionError(f"still at work after {max_turns} turns")


@settings(max_examples=100)
@given(
    requests=st.lists(st.tuples(MIXES, st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=14),
    spare=st.integers(0, 2),
    delay=st.integers(0, 2),
    max_skips=st.sampled_from([1, 64]),
)
def test_every_mix_that_fits_the_memory_is_answered(
    stand_ins: ModuleType,
    requests: list[tuple[list[str], int, int]],
    spare: int,
    delay: int,
    max_skips: int,
) -> None:
    largest = max(sum(SIZES[digest] for digest in mix) for mix, _, _ in requests)
    crowd = Crowd(stand_ins, AdaptersInMemory(SIZES, largest + spare, delay), max_skips)
    for index, (mix, wait, num_tokens) in enumerate(requests):
        crowd.submit(f"r{index}", mix, num_tokens)
        for _ in range(wait):
            crowd.turn()
    crowd.run(2000)
    assert sorted(crowd.ended) == sorted(f"r{index}" for index in range(len(requests)))


def test_mixes_that_could_evict_each_other_for_ever_are_answered_the_oldest_first(
    stand_ins: ModuleType,
) -> None:
    """With the least recently used alone to go, none of these four ever has all of its own."""
    sizes = {"a": 2, "b": 1, "c": 1, "d": 2, "e": 2, "f": 4, "g": 2}
    crowd = Crowd(stand_ins, AdaptersInMemory(sizes, budget=8))
    for mix in ("be", "bfg", "abcd", "bcef"):
        crowd.submit(mix, mix)
    crowd.run(100)
    assert crowd.ended[0] == "be"


def test_a_mix_that_never_fits_fails_alone(stand_ins: ModuleType) -> None:
    crowd = Crowd(stand_ins, AdaptersInMemory({"a": 3, "b": 3, "c": 3}, budget=6))
    for mix in ("abc", "ab", "c"):
        crowd.submit(mix, mix)
    crowd.run(100)
    assert sorted(crowd.ended) == ["ab", "c", "mix_not_served"]


def test_a_mix_that_never_fits_is_loaded_for_one_of_many_requests(stand_ins: ModuleType) -> None:
    adapters = AdaptersInMemory({"a": 3, "b": 3, "c": 3}, budget=6)
    crowd = Crowd(stand_ins, adapters)
    for number in range(8):
        crowd.submit(f"choice {number}", "abc")
    crowd.run(100)
    crowd.submit("later", "abc")
    crowd.run(100)
    assert crowd.ended == ["mix_not_served"] * 9
    assert adapters.loads == ["a", "b", "c"]
