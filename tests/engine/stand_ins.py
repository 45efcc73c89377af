"""A runner without a model and adapters without tensors, for tests of everything around them.

The runner's logits are a fixed function of a sequence's tokens and adapters, and the tokens are drawn by
the real sampler. In place of keys and values it writes down what was computed at each place of the cache,
and looks, before each chunk, whether what the chunk would attend to is what that sequence computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import compress

import torch

from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.pinning import Pinning
from timbre_server.adapters.residency import Departure
from timbre_server.adapters.runtime import Arrival, LoadFailure
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit, TokenEvent, TokenLogprobs
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.engine.sampler import SamplingRow, sample
from timbre_server.engine.scheduler import Scheduler, SchedulerLimits
from timbre_server.engine.sequence import ChunkResult, ScheduledChunk, Sequence, StepPlan, StepResult

VOCAB_SIZE = 23
BLOCK_SIZE = 4


def a_request(request_id: str, prompt: Iterable[int] | int = 6, **options: object) -> Submit:
    """A request of a prompt (or of so many tokens), greedy if nothing else is said."""
    tokens = [len(request_id) + index for index in range(prompt)] if isinstance(prompt, int) else list(prompt)
    mix = tuple(AdapterUse(*each) for each in options.pop("mix", ()))  # type: ignore[attr-defined]
    salt = str(options.pop("salt", ""))
    sampling = SamplingParams(**{"temperature": 0.0, **options})  # type: ignore[arg-type]
    return Submit(request_id, [token % VOCAB_SIZE for token in tokens], sampling, mix, salt)


def logits_of(sequence: Sequence, length: int) -> torch.Tensor:
    """What follows the first ``length`` tokens under the sequence's adapters."""
    key = repr((sequence.token_ids[:length], sequence.mix)).encode()
    seed = int.from_bytes(hashlib.sha256(key).digest()[:6], "big")
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


@dataclass
class ScriptedRunner:
    block_size: int = BLOCK_SIZE
    logits: Callable[[Sequence, int], torch.Tensor] = logits_of
    fails: Callable[[StepPlan], bool] = lambda plan: False
    plans: list[tuple[tuple[str, int, int], ...]] = field(default_factory=list)
    """Of each step: (request id, start, end) of every chunk."""
    written: dict[int, str] = field(default_factory=dict)

    def execute(self, plan: StepPlan) -> StepResult:
        self.plans.append(tuple((c.sequence.request_id, c.start, c.end) for c in plan.chunks))
        if self.fails(plan):
            raise RuntimeError("the device is on fire")
        for chunk in plan.chunks:
            self._check_prefix(chunk)
        for chunk in plan.chunks:
            self._write(chunk)
        return StepResult(tuple(self._result(chunk) for chunk in plan.chunks))

    def _entries(self, sequence: Sequence, position: int) -> list[tuple[int, str]]:
        """Where each pass over a token has its entries, and what they follow from."""
        turns = [turn for turn in (0, *sequence.turns) if turn <= position]
        mixes = [(turn, tuple(compress(sequence.mix, sequence.acting(turn)))) for turn in turns]
        known = sequence.token_ids[: position + 1], sequence.request.cache_salt
        passes = zip(sequence.tables, [mixes, [(0, ())]], strict=False)
        return [(self._place(table, position), repr((known, each))) for table, each in passes]

    def _place(self, table: list[int], position: int) -> int:
        block = table[position // self.block_size]
        assert block != 0, "block 0 is for padding"
        return block * self.block_size + position % self.block_size

    def _check_prefix(self, chunk: ScheduledChunk) -> None:
        for place, content in (e for p in range(chunk.start) for e in self._entries(chunk.sequence, p)):
            assert self.written[place] == content, "another sequence's KV entries"

    def _write(self, chunk: ScheduledChunk) -> None:
        for position in range(chunk.start, chunk.end):
            self.written.update(self._entries(chunk.sequence, position))

    def _result(self, chunk: ScheduledChunk) -> ChunkResult:
        sequence, count = chunk.sequence, chunk.sequence.num_prompt_tokens
        result = ChunkResult()
        if chunk.draws_token:
            row = SamplingRow(sequence.request.sampling, sequence.seen_ids(), sequence.token_ids[count:])
            result = sample(self.logits(sequence, chunk.end)[None], [row])[0]
        if sequence.request.sampling.prompt_logprobs is not None and sequence.num_output_tokens == 0:
            first = max(chunk.start, sequence.num_virtual_tokens) + 1
            scored = sequence.token_ids[first : min(chunk.end, count - 1) + 1]
            result.prompt_logprobs = tuple(
                TokenLogprobs(token, -float(first + at), 1) for at, token in enumerate(scored)
            )
        return result


@dataclass
class LoadingAdapters:
    """Adapters by digest: each takes ``delay`` calls of `turn` to load; at most ``capacity`` are in memory.

    Digests that start with "bad" never load.
    """

    capacity: int = 4
    delay: int = 0
    users: dict[str, int] = field(default_factory=dict)
    loading: dict[str, int] = field(default_factory=dict)
    most_in_use: int = 0

    def turn(self) -> None:
        for digest, left in tuple(self.loading.items()):
            if left > 0:
                self.loading[digest] = left - 1
            else:
                self._place(digest)

    def try_acquire(self, digest: str) -> int | None:
        if digest not in self.users:
            self.loading.setdefault(digest, self.delay)
            return None
        self.users[digest] += 1
        in_use = sum(count > 0 for count in self.users.values())
        self.most_in_use = max(self.most_in_use, in_use)
        return int.from_bytes(digest.encode(), "big")

    def release(self, digest: str) -> None:
        assert self.users[digest] > 0, "released more often than acquired"
        self.users[digest] -= 1

    def failure(self, digest: str) -> LoadFailure | None:
        return LoadFailure("adapter_load_failed", f"{digest} is broken") if digest.startswith("bad") else None

    def no_requests(self, digest: str) -> None:
        self.loading.pop(digest, None)

    def favour(self, digests: Iterable[str]) -> None: ...

    def misfit(self, digests: Iterable[str]) -> str | None:
        return None

    def _place(self, digest: str) -> bool:
        """Whether there was room."""
        if len(self.users) >= self.capacity:
            idle = [other for other, count in self.users.items() if count == 0]
            if not idle:
                return False
            del self.users[idle[0]]
        self.users[digest] = 0
        del self.loading[digest]
        return True


@dataclass
class AdaptersBesideTheLoop(LoadingAdapters):
    """The same as the loop knows it: wishes become loads at one `poll`, and adapters at the next."""

    begun: list[str] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    gone: list[Departure] = field(default_factory=list)
    on_load_ended: Callable[[], None] = lambda: None

    @property
    def num_resident(self) -> int:
        return len(self.users)

    def is_resident(self, digest: str) -> bool:
        return digest in self.users

    def last_used(self, count: int) -> tuple[str, ...]:
        return tuple(self.users)[-count:]

    @property
    def resident_bytes(self) -> int:
        return 100 * len(self.users)

    def load(self, digest: str) -> None:
        self.loading.setdefault(digest, 0)

    def unload(self, digest: str, *, has_requests: bool = False) -> None:
        self.users.pop(digest, None)
        self.gone.append(Departure(digest, 0, "unloaded"))

    def failure(self, digest: str) -> LoadFailure | None:
        return super().failure(digest) if digest in self.failed else None

    def hold(self, digests: Iterable[str], num_bytes: int = 0) -> bool:
        return True

    def poll(self) -> tuple[list[Arrival], list[Departure]]:
        arrivals = []
        for digest in [digest for digest in self.loading if digest in self.begun]:
            if digest.startswith("bad"):
                self.failed.add(digest)
                del self.loading[digest]
                arrivals.append(Arrival(digest, failure=self.failure(digest)))
            elif self._place(digest):
                arrivals.append(Arrival(digest, "scripted", 100, {"verify": 0.25}))
            else:
                continue
            self.begun.remove(digest)
        for digest in [digest for digest in self.loading if digest not in self.begun]:
            self.begun.append(digest)
            self.on_load_ended()
        gone, self.gone = self.gone, []
        return arrivals, gone


@dataclass
class Bench:
    """A scheduler with its stand-ins, turned by hand; looks after each turn that all promises hold."""

    scheduler: Scheduler
    runner: ScriptedRunner
    adapters: LoadingAdapters
    events: list[TokenEvent] = field(default_factory=list)

    def turn(self) -> StepPlan:
        scheduler = self.scheduler
        self.adapters.turn()
        plan = scheduler.schedule()
        assert plan.num_tokens <= scheduler.limits.max_num_batched_tokens
        assert len(plan.chunks) <= scheduler.num_running <= scheduler.limits.max_num_seqs
        assert len({chunk.sequence for chunk in plan.chunks}) == len(plan.chunks)
        assert all(chunk.num_tokens > 0 for chunk in plan.chunks)
        scheduler.blocks.check_integrity()
        if not plan.chunks:
            self.events += scheduler.take_events()
        elif self.runner.fails(plan):
            self.events += scheduler.fail(plan, "engine_error", "the device is on fire")
        else:
            self.events += scheduler.update(plan, self.runner.execute(plan))
        scheduler.blocks.check_integrity()
        return plan

    def run(self, max_turns: int = 500) -> None:
        """Turn until nothing is left to do."""
        for _ in range(max_turns):
            if not self.scheduler.has_work:
                return
            self.turn()
        raise AssertionError(f"still at work after {max_turns} turns")

    def submit(self, *requests: Submit) -> None:
        for request in requests:
            self.scheduler.add(request)

    def tokens(self, request_id: str) -> list[int]:
        return [token for event in self.events_of(request_id) for token in event.token_ids]

    def final(self, request_id: str) -> TokenEvent:
        """The one final event of a request, which must be its last."""
        events = self.events_of(request_id)
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
        return events[-1]

    def events_of(self, request_id: str) -> list[TokenEvent]:
        return [event for event in self.events if event.request_id == request_id]

    def check_nothing_is_held(self) -> None:
        assert self.scheduler.blocks.num_used == 0
        assert set(self.adapters.users.values()) <= {0}
        assert (self.scheduler.num_running, self.scheduler.num_waiting) == (0, 0)


def a_bench(
    *, num_blocks: int = 64, max_num_seqs: int = 8, max_num_batched_tokens: int = 16, **options: object
) -> Bench:
    """A bench of small limits; further options go to the limits (or ``adapters``, ``runner``)."""
    adapters = options.pop("adapters", None) or LoadingAdapters()
    runner = options.pop("runner", None) or ScriptedRunner()
    limits = SchedulerLimits(
        max_num_seqs,
        max_num_batched_tokens,
        **{"max_model_len": 100, "vocab_size": VOCAB_SIZE, **options},  # type: ignore[arg-type]
    )
    assert isinstance(adapters, LoadingAdapters)
    assert isinstance(runner, ScriptedRunner)
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    return Bench(Scheduler(limits, pool, adapters), runner, adapters)


def tokens_alone(request: Submit) -> list[int]:
    """What a request gives with nobody beside it and room for everything."""
    bench = a_bench(max_num_batched_tokens=200)
    bench.submit(request)
    bench.run()
    return bench.tokens(request.request_id)


def a_pinning(adapters: LoadingAdapters) -> Pinning:
    """The real one, on a model without layers."""
    packer = LinearPacker(torch.float32, torch.device("cpu"))
    return Pinning(AdaptedModel(torch.nn.Module(), []), adapters, {}, packer)  # type: ignore[arg-type]
