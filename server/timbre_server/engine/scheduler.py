"""Continuous batching: which requests run in a step, how many tokens of each, and what became of them.

`schedule` makes a plan, somebody executes it, `update` (or `fail`) books the outcome. Every added request
ends in exactly one final event. No tensors, no sockets, no clock; whom to prefer is decided in `policy`,
where KV entries lie in `block_tables`; what adapters are is known to nobody here.

A sequence holds all blocks of its present tokens from admission on, so that only decoding can run out of
them; then the latest to arrive is preempted: it loses its blocks and computes them again later (most often
from the prefix cache). It keeps its tokens, and drawing depends on nothing else but logits. These are the
same up to rounding: tokens that were decoded are now computed as those of a prompt are.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from timbre_server.engine import policy
from timbre_server.engine.block_tables import BlockTables
from timbre_server.engine.kv_blocks import BlockPool, resolved_mix
from timbre_server.engine.messages import Submit, TokenEvent
from timbre_server.engine.mix_slots import AdapterSlotsSource, MixSlots
from timbre_server.engine.outcome import final_event, refusal, stop_reason, token_event
from timbre_server.engine.sequence import (
    ChunkResult,
    ScheduledChunk,
    Sequence,
    Status,
    StepPlan,
    StepResult,
    first_tokens,
    scouts,
)


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    vocab_size: int | None = None
    """None: token ids are not checked."""
    enable_prefix_caching: bool = True
    max_skips: int = 64
    """See `policy.is_held_back`."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclass(slots=True)
class StepCounts:
    """What was counted since the last `Scheduler.schedule` began."""

    prompt_tokens: int = 0
    """Of requests whose prompt was completed: the whole prompt, once a request."""
    generation_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    waiting_for_adapter: int = 0


class Scheduler:
    def __init__(self, limits: SchedulerLimits, blocks: BlockPool, adapters: AdapterSlotsSource) -> None:
        self.limits = limits
        self.blocks = blocks
        self.counts = StepCounts()
        self.max_len = min(limits.max_model_len, blocks.num_usable * blocks.block_size)
        """Tokens that one request may have: the whole KV cache holds at least one request. One that scouts
        has each of its tokens there twice."""
        self._tables = BlockTables(blocks, enable_prefix_caching=limits.enable_prefix_caching)
        self._mixes = MixSlots(adapters)
        self._sequences: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []
        """In order of arrival, the preempted among them."""
        self._running: list[Sequence] = []
        self._events: list[TokenEvent] = []
        self._num_arrived = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_adapters(self) -> tuple[str, ...]:
        """Digests that a waiting request asked for in vain at the last `schedule`."""
        return self._mixes.missing

    def has_requests(self, digest: str) -> bool:
        """Whether a request that has not ended uses the adapter, or will ask for it."""
        return self._mixes.has_requests(digest)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._events)

    def add(self, request: Submit) -> None:
        """Queue a request, or end it at once where it can never run."""
        assert request.request_id not in self._sequences, f"request id {request.request_id} is in use"
        refused = refusal(request, self._max_len(request), self.limits.vocab_size)
        if refused is not None:
            self._events.append(refused)
            return
        self._num_arrived += 1
        sequence = Sequence(request, first_tokens(request), self._num_arrived)
        sequence.mix = resolved_mix(request.adapters)
        self._mixes.enter(sequence)
        self._sequences[request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """End a request and free now what it holds. Unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, final_event(sequence, "abort"))

    def take_events(self) -> tuple[TokenEvent, ...]:
        """Every event since the last call of this, `update` or `fail`."""
        events = tuple(self._events)
        self._events.clear()
        return events

    def schedule(self) -> StepPlan:
        """The next step; empty where nothing can run. To be booked before anything else is called here."""
        self.counts = StepCounts()
        self._mixes.begin_step()
        planned: dict[Sequence, int] = {}
        budget = self._plan_running(planned)
        if self.counts.preemptions == 0:
            self._admit(planned, budget)
        return StepPlan(tuple(ScheduledChunk(sequence, count) for sequence, count in planned.items()))

    def update(self, plan: StepPlan, result: StepResult) -> tuple[TokenEvent, ...]:
        """Book what a plan gave. Returns `take_events`."""
        for chunk, outcome in zip(plan.chunks, result.results, strict=True):
            if outcome.error_message is None:
                self._advance(chunk, outcome)
            else:
                for table in chunk.sequence.tables:
                    self.blocks.forget(table)
                self._fail(chunk.sequence, "invalid_logits", outcome.error_message)
        return self.take_events()

    def fail(self, plan: StepPlan, code: str, message: str) -> tuple[TokenEvent, ...]:
        """End every request of a plan that could not be executed. Returns `take_events`."""
        for chunk in plan.chunks:
            self._fail(chunk.sequence, code, message)
        return self.take_events()

    def _max_len(self, request: Submit) -> int:
        num_tables = 2 if scouts(request) else 1
        num_blocks = self.blocks.num_usable // num_tables
        return min(self.limits.max_model_len, num_blocks * self.blocks.block_size)

    def _plan_running(self, planned: dict[Sequence, int]) -> int:
        budget = self.limits.max_num_batched_tokens
        for sequence in policy.running_order(self._running):
            if sequence.status is not Status.RUNNING:
                continue
            if budget <= 0:
                break
            count = policy.num_tokens_within(sequence, budget)
            missing = self._tables.num_missing(sequence, count)
            while missing > self.blocks.num_free and sequence.status is Status.RUNNING:
                victim = policy.victim(self._running)
                budget += planned.pop(victim, 0) * victim.row_copies
                self._preempt(victim)
            if sequence.status is Status.RUNNING:
                self._tables.grow(sequence, missing)
                planned[sequence] = count
                budget -= count * sequence.row_copies
        return budget

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._tables.free(sequence)
        self._mixes.release(sequence)
        sequence.status = Status.WAITING
        insort(self._waiting, sequence, key=lambda waiting: waiting.arrival)
        self.counts.preemptions += 1

    def _admit(self, planned: dict[Sequence, int], budget: int) -> None:
        passed_over: list[Sequence] = []
        most_skips = 0
        for sequence in tuple(self._waiting):
            if budget <= 0 or len(self._running) == self.limits.max_num_seqs:
                break
            failure = self._mixes.failure(sequence)
            if failure is not None:
                self._fail(sequence, *failure)
                continue
            if policy.is_held_back(sequence, most_skips, self.limits.max_skips):
                continue
            if not self._mixes.acquire(sequence):
                passed_over.append(sequence)
                most_skips = max(most_skips, sequence.num_skips)
                continue
            num_growing = sum(len(running.tables) for running in self._running)
            if not self._tables.place(sequence, num_growing):
                self._mixes.release(sequence)
                break
            self._start(sequence)
            planned[sequence] = policy.num_tokens_within(sequence, budget)
            budget -= planned[sequence] * sequence.row_copies
            for other in passed_over:
                other.num_skips += 1
                most_skips = max(most_skips, other.num_skips)
        self.counts.waiting_for_adapter = len(passed_over)

    def _start(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.status = Status.RUNNING
        self.counts.prefix_queried_tokens += len(sequence.token_ids)
        self.counts.prefix_hit_tokens += sequence.num_computed_tokens

    def _advance(self, chunk: ScheduledChunk, outcome: ChunkResult) -> None:
        sequence, draws_token = chunk.sequence, chunk.draws_token
        num_known = len(sequence.prompt_logprobs) - max(0, chunk.start - sequence.num_virtual_tokens)
        sequence.prompt_logprobs += outcome.prompt_logprobs[max(num_known, 0) :]
        self._tables.advance(sequence, chunk.end)
        if not draws_token:
            return
        is_first = sequence.num_output_tokens == 0
        if is_first:
            self.counts.prompt_tokens += len(sequence.request.prompt_token_ids)
        if sequence.request.sampling.max_tokens == 0:
            self._end(sequence, final_event(sequence, "length"))
            return
        assert outcome.token_id is not None, "the plan asked for a token and the runner drew none"
        sequence.token_ids.append(outcome.token_id)
        self.counts.generation_tokens += 1
        reason = stop_reason(sequence, self._max_len(sequence.request))
        event = token_event(sequence, outcome, reason, is_first=is_first)
        if reason is None:
            self._events.append(event)
        else:
            self._end(sequence, event)

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self._end(sequence, final_event(sequence, "error", code=code, message=message))

    def _end(self, sequence: Sequence, event: TokenEvent) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._tables.free(sequence)
        self._mixes.leave(sequence)
        sequence.status = Status.FINISHED
        del self._sequences[sequence.request_id]
        self._events.append(event)
