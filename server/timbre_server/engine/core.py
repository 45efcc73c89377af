"""The engine's loop without sockets: requests in, one `StepOutput` a turn out. Never waits for anything.

A turn takes finished adapter loads, schedules, executes and books. What goes wrong in a step ends the
requests of that step and no others; when steps keep failing the engine gives up, since then the device is
to blame and not a request.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from timbre_server.adapters.derivation import Derivation
from timbre_server.adapters.pinning import Mix, PinEnded, Pinned
from timbre_server.adapters.residency import Departure
from timbre_server.adapters.runtime import Arrival
from timbre_server.engine.kv_blocks import resolved_mix
from timbre_server.engine.messages import (
    Abort,
    AdapterLoaded,
    AdapterUnloaded,
    AdapterUse,
    Command,
    DeriveTensors,
    LoadAdapter,
    StepOutput,
    StepStats,
    Submit,
    TensorsDerived,
    TokenEvent,
    UnloadAdapter,
)
from timbre_server.engine.mix_slots import AdapterSlotsSource
from timbre_server.engine.pin_messages import PinAdapter, PinAnswer, PinnedAdapter, UnpinAdapter
from timbre_server.engine.scheduler import Scheduler
from timbre_server.engine.sequence import StepPlan, StepResult
from timbre_server.errors import EngineDied

MAX_FAILED_STEPS = 3
"""In a row; the engine ends with the last of them."""
MAX_RESIDENT_TOLD = 256
"""So many digests at most, the last used, are told after each step."""
STEP_FAILED = "the engine could not run the step that this request was part of; it is safe to try again"

_log = logging.getLogger(__name__)


class StepRunner(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Results in the plan's order. Any exception means that nothing of the step counts."""
        ...


class ResidentAdapters(AdapterSlotsSource, Protocol):
    """Adapters in memory, and the loads that run beside the loop (`adapters.runtime`)."""

    @property
    def num_resident(self) -> int: ...

    def is_resident(self, digest: str) -> bool: ...

    def last_used(self, count: int) -> tuple[str, ...]:
        """So many digests in memory at most, most recently used last."""
        ...

    @property
    def resident_bytes(self) -> int: ...

    def load(self, digest: str) -> None: ...

    def unload(self, digest: str, *, has_requests: bool) -> None: ...

    def poll(self) -> tuple[Sequence[Arrival], Sequence[Departure]]: ...


class DerivedTensors(Protocol):
    """What registration computes from the base's weights, beside the loop (`adapters.derivation`)."""

    def begin(self, config: bytes, tensors_path: str, derived_path: str) -> None: ...

    def poll(self) -> Sequence[Derivation]: ...


class MergedPins(Protocol):
    """The one mix whose weights are merged (`adapters.pinning`)."""

    @property
    def pinned(self) -> Pinned | None: ...

    def pin(self, digest: str, mix: Mix) -> None: ...

    def unpin(self, digest: str) -> None: ...

    def forget(self, digest: str) -> None: ...

    def poll(self) -> Sequence[PinEnded]: ...


class EngineCore:
    """One scheduler, one runner, the adapters. Not for several threads."""

    def __init__(
        self,
        runner: StepRunner,
        scheduler: Scheduler,
        adapters: ResidentAdapters,
        derivations: DerivedTensors,
        pinning: MergedPins,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._adapters = adapters
        self._derivations = derivations
        self._pinning = pinning
        self._loaded: list[AdapterLoaded] = []
        self._unloaded: list[AdapterUnloaded] = []
        self._num_failed_steps = 0
        self._expert_tokens: dict[str, tuple[int, ...]] = {}

    @property
    def has_work(self) -> bool:
        """Whether a request is here that has not ended, or whose end was not told yet."""
        return self._scheduler.has_work

    def take(self, message: Command) -> None:
        """Do what a message says; its answer comes with a later `step`."""
        match message:
            case Submit():
                self.submit(message)
            case Abort():
                self.abort(message.request_id)
            case LoadAdapter():
                self.load_adapter(message.digest)
            case UnloadAdapter():
                self.unload_adapter(message.digest)
            case DeriveTensors():
                self._derivations.begin(message.config, message.tensors_path, message.derived_path)
            case PinAdapter():
                self._pinning.pin(message.digest, resolved_mix(AdapterUse(*each) for each in message.mix))
            case UnpinAdapter():
                self._pinning.unpin(message.digest)

    def submit(self, request: Submit) -> None:
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        self._scheduler.abort(request_id)

    def load_adapter(self, digest: str) -> None:
        if self._adapters.is_resident(digest):
            self._loaded.append(AdapterLoaded(digest))
        else:
            self._adapters.load(digest)

    def unload_adapter(self, digest: str) -> None:
        self._pinning.forget(digest)
        self._adapters.unload(digest, has_requests=self._scheduler.has_requests(digest))

    def step(self) -> StepOutput:
        """One turn. Without work it costs next to nothing and its ``batch_tokens`` are 0.

        Raises EngineDied after `MAX_FAILED_STEPS` failed steps in a row.
        """
        self._take_loads()
        pins = tuple(map(_pin_answer, self._pinning.poll()))
        plan = self._scheduler.schedule()
        if self._scheduler.waiting_adapters:
            self._take_loads()  # Loads that were just wished for begin now, beside the step.
        started = _started(plan)
        began_s = time.perf_counter()
        self._expert_tokens = {}
        events = self._execute(plan) if plan.chunks else self._scheduler.take_events()
        seconds = time.perf_counter() - began_s if plan.chunks else 0.0
        loaded, unloaded = tuple(self._loaded), tuple(self._unloaded)
        self._loaded.clear()
        self._unloaded.clear()
        derived = tuple(TensorsDerived(d.derived_path, d.code, d.reason) for d in self._derivations.poll())
        return StepOutput(self._stats(plan, seconds), events, loaded, unloaded, derived, started, pins)

    def _execute(self, plan: StepPlan) -> tuple[TokenEvent, ...]:
        try:
            result = self._runner.execute(plan)
        except Exception as error:
            self._num_failed_steps += 1
            _log.exception("step of %d tokens failed", plan.num_tokens)
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise EngineDied(
                    f"{self._num_failed_steps} steps in a row failed, the last with {type(error).__name__}"
                ) from error
            return self._scheduler.fail(plan, "engine_error", STEP_FAILED)
        self._num_failed_steps = 0
        self._expert_tokens = dict(result.expert_tokens)
        return self._scheduler.update(plan, result)

    def _take_loads(self) -> None:
        arrivals, departures = self._adapters.poll()
        for arrival in arrivals:
            self._loaded.append(
                AdapterLoaded(
                    arrival.digest,
                    method=arrival.method,
                    prepared_bytes=arrival.prepared_bytes,
                    seconds_by_phase=arrival.seconds_by_phase,
                    error_code=arrival.failure and arrival.failure.code,
                    error_message=arrival.failure and arrival.failure.message,
                )
            )
        self._unloaded += (AdapterUnloaded(gone.digest, gone.reason) for gone in departures)

    def _stats(self, plan: StepPlan, seconds: float) -> StepStats:
        scheduler, counts = self._scheduler, self._scheduler.counts
        return StepStats(
            timestamp=time.time(),
            step_seconds=seconds,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_waiting_for_adapter=counts.waiting_for_adapter,
            num_kv_blocks_used=scheduler.blocks.num_used,
            batch_tokens=plan.num_tokens,
            prompt_tokens=counts.prompt_tokens,
            generation_tokens=counts.generation_tokens,
            distinct_adapters=len({digest for chunk in plan.chunks for digest, _ in chunk.sequence.mix}),
            prefix_queried_tokens=counts.prefix_queried_tokens,
            prefix_hit_tokens=counts.prefix_hit_tokens,
            preemptions=counts.preemptions,
            num_resident_adapters=self._adapters.num_resident,
            resident_adapters=self._adapters.last_used(MAX_RESIDENT_TOLD),
            waiting_adapters=scheduler.waiting_adapters,
            resident_adapter_bytes=self._adapters.resident_bytes,
            pinned=_pinned_adapter(self._pinning.pinned),
            expert_tokens=self._expert_tokens,
        )


def _started(plan: StepPlan) -> tuple[str, ...]:
    """Requests that leave the queue with this step: nothing of theirs ran, but what the cache had."""
    return tuple(
        chunk.sequence.request_id
        for chunk in plan.chunks
        if chunk.start == chunk.sequence.num_cached_tokens and chunk.sequence.num_output_tokens == 0
    )


def _pin_answer(ended: PinEnded) -> PinAnswer:
    return PinAnswer(ended.asked, ended.digest, _pinned_adapter(ended.pinned), ended.code, ended.reason)


def _pinned_adapter(pinned: Pinned | None) -> PinnedAdapter | None:
    return None if pinned is None else PinnedAdapter(pinned.digest, pinned.num_sites, pinned.merged_bytes)
