"""Everything that ``/metrics`` says. The only module that knows Prometheus.

Names, labels and buckets of ``vllm:`` series are vLLM's, so that its boards and routers work unchanged;
``timbre_`` series are our own. Numbers are kept in plain Python on the event loop's thread and made into
families at the scrape, so no series can be there twice, and an adapter's series can leave again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from timbre_server.engine.messages import Ready
from timbre_server.metrics_catalogue import (
    ADAPTER_COUNTERS,
    COUNTERS,
    EXPERT_TOKENS,
    MODEL_LABELS,
    CounterSpec,
)
from timbre_server.tally import Tally


class Metrics(Collector):
    """The tally and the engine as families. ``name_of`` tells the name a digest was last asked for by."""

    def __init__(
        self,
        tally: Tally,
        engine: Ready,
        *,
        name_of: Callable[[str], str | None],
        max_adapters: int = 256,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._tally = tally
        self._engine = engine
        self._name_of = name_of
        self._max_adapters = max_adapters
        self._wall_clock = wall_clock
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        self._registry.register(self)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text of a scrape, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        """All families. Called by the registry."""
        for name, spec in COUNTERS.items():
            yield _counter(name, spec, self._tally.counters[name].items())
        for name, histogram_spec in self._tally.histogram_specs.items():
            family = HistogramMetricFamily(name, histogram_spec.meaning, labels=histogram_spec.labels)
            for values, histogram in self._tally.histograms[name].items():
                family.add_metric(values, histogram.cumulative(), histogram.total)
            yield family
        for column, (name, meaning) in enumerate(ADAPTER_COUNTERS):
            rows = [((adapter,), value) for adapter, value in self._tally.adapters.column(column)]
            yield _counter(name, CounterSpec(meaning, ("adapter",)), rows)
        yield self._expert_tokens()
        yield from self._load_gauges()
        yield from self._adapter_gauges()
        yield self._cache_config()
        yield self._engine_info()
        yield self._lora_info()

    def _expert_tokens(self) -> Metric:
        name, meaning = EXPERT_TOKENS
        amounts: dict[tuple[str, str], float] = {}
        for key, amount in self._tally.experts.column(0):
            digest, _, expert = key.partition(" ")
            labels = (self._name_of(digest) or digest, expert)
            amounts[labels] = amounts.get(labels, 0.0) + amount
        return _counter(name, CounterSpec(meaning, ("adapter", "expert")), amounts.items())

    def _load_gauges(self) -> Iterator[Metric]:
        stats, engine = self._tally.stats, self._engine
        yield self._gauge("vllm:num_requests_running", "Sequences in the batch.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Sequences that wait.", stats.num_waiting)
        reasons = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Sequences that wait for room, or for their adapter (deferred).",
            labels=(*MODEL_LABELS, "reason"),
        )
        deferred = stats.num_waiting_for_adapter
        for reason, count in (("capacity", max(0, stats.num_waiting - deferred)), ("deferred", deferred)):
            reasons.add_metric(self._tally.label_values(MODEL_LABELS, reason), count)
        yield reasons
        usage = stats.num_kv_blocks_used / max(1, engine.num_kv_blocks)
        yield self._gauge("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", usage)
        yield _plain(
            "timbre_queue_oldest_seconds",
            "How long the oldest sequence has waited for its first step.",
            self._tally.oldest_wait_s(),
        )
        yield _plain(
            "timbre_engine_last_step_timestamp_seconds",
            "Unix time of the last step.",
            self._tally.last_step_at,
        )

    def _adapter_gauges(self) -> Iterator[Metric]:
        stats, engine = self._tally.stats, self._engine
        states = GaugeMetricFamily(
            "timbre_adapters", "Adapters in memory, or wanted there.", labels=("state",)
        )
        states.add_metric(("resident",), stats.num_resident_adapters)
        states.add_metric(("waiting",), len(set(stats.waiting_adapters) - set(stats.resident_adapters)))
        yield states
        used = GaugeMetricFamily(
            "timbre_adapter_bytes", "Prepared bytes of adapters by tier.", labels=("tier",)
        )
        used.add_metric((engine.device,), stats.resident_adapter_bytes)
        yield used
        pinned = GaugeMetricFamily(
            "timbre_pinned_sites",
            "Layers with merged weights of the adapter that is pinned.",
            labels=("adapter",),
        )
        if stats.pinned is not None:
            digest = stats.pinned.digest
            pinned.add_metric((self._name_of(digest) or digest,), stats.pinned.num_sites)
        yield pinned
        yield _plain(
            "timbre_pinned_bytes", "Of merged weights, in the memory for adapters.", self._pinned_bytes()
        )
        yield _plain("timbre_adapter_budget_bytes", "Memory for adapters.", engine.adapter_budget_bytes)

    def _cache_config(self) -> Metric:
        engine = self._engine
        labels = {
            **dict(zip(MODEL_LABELS, self._tally.label_values(MODEL_LABELS), strict=True)),
            "block_size": str(engine.block_size),
            "num_gpu_blocks": str(engine.num_kv_blocks),
            "cache_dtype": engine.dtype,
        }
        family = GaugeMetricFamily(
            "vllm:cache_config_info", "How the KV cache is set up.", labels=tuple(labels)
        )
        family.add_metric(tuple(labels.values()), 1)
        return family

    def _engine_info(self) -> Metric:
        labels = {"device": self._engine.device, "dtype": self._engine.dtype, "kernels": self._engine.kernels}
        family = GaugeMetricFamily(
            "timbre_engine_info", "Where and how the engine computes.", labels=tuple(labels)
        )
        family.add_metric(tuple(labels.values()), 1)
        return family

    def _lora_info(self) -> Metric:
        """One series, made now: who is in memory, who is wanted, and how many there is room for.

        The two sets are disjoint and together no larger than ``max_lora``, with the most recent first.
        """
        most = min(self._max_adapters, self._room())
        running = self._names(reversed(self._tally.stats.resident_adapters), ())[:most]
        waiting = self._names(self._tally.stats.waiting_adapters, running)[: most - len(running)]
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in memory (running) and wanted (waiting); the value is the time.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        family.add_metric((str(self._room()), ",".join(running), ",".join(waiting)), self._wall_clock())
        return family

    def _room(self) -> int:
        """How many adapters fit in memory, if those to come are as large as those that are there."""
        resident, used = self._tally.stats.num_resident_adapters, self._tally.stats.resident_adapter_bytes
        if not resident or not used:
            return self._max_adapters
        left = max(0, self._engine.adapter_budget_bytes - self._pinned_bytes() - used)
        return resident + left * resident // used

    def _pinned_bytes(self) -> int:
        pinned = self._tally.stats.pinned
        return 0 if pinned is None else pinned.merged_bytes

    def _names(self, digests: Iterable[str], taken: Iterable[str]) -> list[str]:
        seen = dict.fromkeys(taken)
        fresh = dict.fromkeys(self._name_of(digest) for digest in digests)
        return [name for name in fresh if name is not None and name not in seen]

    def _gauge(self, name: str, meaning: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, meaning, labels=MODEL_LABELS)
        family.add_metric(self._tally.label_values(MODEL_LABELS), value)
        return family


def _counter(name: str, spec: CounterSpec, rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = CounterMetricFamily(name, spec.meaning, labels=spec.labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _plain(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=value)
