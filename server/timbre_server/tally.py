"""What is counted between two scrapes, fed by the engine's client and by HTTP. Knows no Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from timbre_server.engine.messages import AdapterLoaded, StepOutput, StepStats
from timbre_server.metrics_catalogue import ADAPTER_COUNTERS, COUNTERS, histograms
from timbre_server.request_record import RequestRecord
from timbre_server.series import Counters, Histograms, RecentCounters, RecentTimes

ENGINE_INDEX = "0"
BASE_LABEL = "_base"
MAX_OPEN_SEQUENCES = 65536
MAX_EXPERT_SERIES = 1024


def prompt_tokens_run(record: RequestRecord) -> int:
    """0 for a sequence that ended before its prompt did. One that may have no output ends with its prompt."""
    is_complete = record.first_token_s is not None or record.finish_reason == "length"
    return record.prompt_tokens if is_complete else 0


class Tally:
    """Counters, histograms and the last step's gauges, by the names of the catalogue. Used on one thread."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        *,
        max_adapters: int = 256,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._model = {"model_name": model_name, "engine": ENGINE_INDEX}
        self._wall_clock = wall_clock
        self.counters = {name: Counters() for name in COUNTERS}
        self.histogram_specs = histograms(max_model_len)
        self.histograms = {name: Histograms(spec.buckets) for name, spec in self.histogram_specs.items()}
        self.adapters = RecentCounters(max_adapters, len(ADAPTER_COUNTERS))
        self.experts = RecentCounters(MAX_EXPERT_SERIES, 1)
        """Of mixtures, by digest and number of the expert."""
        self._clock = clock
        self._last_tokens = RecentTimes(MAX_OPEN_SEQUENCES, clock)
        self._starts = RecentTimes(MAX_OPEN_SEQUENCES, clock)
        self._waiting: dict[str, float] = {}
        """When each sequence came that no step has taken up; the oldest first."""
        self.stats = StepStats()
        self.last_step_at = 0.0
        for name, spec in COUNTERS.items():
            for values in spec.always:
                self._count(name, *values, amount=0)
        for name, histogram_spec in self.histogram_specs.items():
            for values in histogram_spec.always:
                self.histograms[name].at(self.label_values(histogram_spec.labels, *values))

    # Fed by the engine's client

    def on_output(self, output: StepOutput) -> None:
        """Counts one turn of the engine's loop."""
        stats = self.stats = output.stats
        if stats.step_seconds > 0:
            self.last_step_at = self._wall_clock()
            self._observe("timbre_engine_step_seconds", stats.step_seconds)
            self._observe("timbre_batch_distinct_adapters", stats.distinct_adapters)
            self._observe("vllm:iteration_tokens_total", stats.batch_tokens)
        self._count("vllm:prompt_tokens", amount=stats.prompt_tokens)
        self._count("vllm:generation_tokens", amount=stats.generation_tokens)
        self._count("vllm:prefix_cache_queries", amount=stats.prefix_queried_tokens)
        self._count("vllm:prefix_cache_hits", amount=stats.prefix_hit_tokens)
        self._count("vllm:num_preemptions", amount=stats.preemptions)
        for digest, tokens in stats.expert_tokens.items():
            for expert, count in enumerate(tokens):
                self.experts.add(f"{digest} {expert}", (float(count),))
        for request_id in output.started:
            self._waiting.pop(request_id, None)
            self._starts.note(request_id, self._clock() - stats.step_seconds)
        for event in output.events:
            gap_s = self._last_tokens.touch(event.request_id) if event.token_ids else None
            if gap_s is not None:
                self._observe("vllm:inter_token_latency_seconds", gap_s)
                self._observe("timbre_inter_token_latency_seconds", gap_s)
            if event.finish_reason is not None:
                self._last_tokens.forget(event.request_id)
            if event.error_code == "invalid_logits":
                self._count("vllm:corrupted_requests")
        for loaded in output.loaded:
            self._on_loaded(loaded)
        for unloaded in output.unloaded:
            if unloaded.reason != "absent":
                self._count("timbre_adapter_evictions", unloaded.reason)

    def _on_loaded(self, loaded: AdapterLoaded) -> None:
        self._count("timbre_adapter_loads", "failed" if loaded.error_code else "ok")
        for phase, seconds in loaded.seconds_by_phase.items():
            self._observe("timbre_adapter_load_seconds", seconds, phase)

    # Fed by HTTP

    def on_submitted(self, request_id: str) -> None:
        """Notes that a sequence waits."""
        self._waiting[request_id] = self._clock()

    def oldest_wait_s(self) -> float:
        """How long the oldest sequence has waited that still waits for its first step; 0 without any."""
        now = self._clock()
        return now - min(self._waiting.values(), default=now)

    def on_finished(self, record: RequestRecord) -> None:
        """Counts one sequence that ended."""
        self._waiting.pop(record.request_id, None)
        self._count("vllm:request_success", record.finish_reason)
        self._count("vllm:prompt_tokens_cached", amount=record.cached_tokens)
        self._observe("vllm:e2e_request_latency_seconds", record.finished_s - record.arrived_s)
        self._observe("vllm:request_prompt_tokens", record.prompt_tokens)
        self._observe("vllm:request_generation_tokens", record.generation_tokens)
        self._observe("vllm:request_params_max_tokens", record.max_tokens)
        self._observe("vllm:request_params_n", record.n)
        started_s = self._starts.forget(record.request_id)
        if record.finish_reason == "abort":
            begun = "prefill" if record.first_token_s is None else "decode"
            self._count("timbre_cancelled", begun if started_s is not None else "queued")
        if started_s is not None:
            self._observe("vllm:request_queue_time_seconds", max(0.0, started_s - record.arrived_s))
            self._observe("vllm:request_inference_time_seconds", record.finished_s - started_s)
            if record.first_token_s is not None:
                self._observe("vllm:request_prefill_time_seconds", record.first_token_s - started_s)
        if record.first_token_s is not None:
            ttft_s = record.first_token_s - record.arrived_s
            self._observe("vllm:time_to_first_token_seconds", ttft_s)
            self._observe("timbre_time_to_first_token_seconds", ttft_s)
            decode_s = record.finished_s - record.first_token_s
            self._observe("vllm:request_decode_time_seconds", decode_s)
            if record.generation_tokens > 1:
                per_token_s = decode_s / (record.generation_tokens - 1)
                self._observe("vllm:request_time_per_output_token_seconds", per_token_s)
        amounts = (1.0, float(prompt_tokens_run(record)), float(record.generation_tokens))
        for label in record.adapters or (BASE_LABEL,):
            self.adapters.add(label, amounts)

    def on_answered(self, route: str, code: int) -> None:
        """Counts one HTTP answer by its route's template."""
        self._count("timbre_requests", route, str(code))

    def on_rejected(self, reason: str) -> None:
        """Counts a request that found the server full."""
        self._count("vllm:admission_rejections", reason)

    def on_store_error(self, operation: str) -> None:
        """Counts a failure of the store that is no client's fault."""
        self._count("timbre_store_errors", operation)

    def on_upload(self, stored_bytes: int | None) -> None:
        """Counts an upload; None: it was refused."""
        self._count("timbre_upload", "refused" if stored_bytes is None else "ok")
        self._count("timbre_upload_bytes", amount=stored_bytes or 0)

    def on_recipe(self, kind: str, *, is_stored: bool) -> None:
        """Counts a recipe of one of the kinds, or its refusal."""
        self._count("timbre_recipes", kind, "ok" if is_stored else "refused")

    def _count(self, name: str, *values: str, amount: float = 1) -> None:
        self.counters[name].add(self.label_values(COUNTERS[name].labels, *values), amount)

    def _observe(self, name: str, value: float, *values: str) -> None:
        self.histograms[name].at(self.label_values(self.histogram_specs[name].labels, *values)).observe(value)

    def label_values(self, labels: tuple[str, ...], *rest: str) -> tuple[str, ...]:
        """The values of a series' labels: the model's own where it has them, then the rest."""
        own = tuple(self._model[label] for label in labels if label in self._model)
        return (*own, *rest)
