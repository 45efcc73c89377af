"""Names, labels, buckets and meanings of all series that are kept; a gauge is read at the scrape instead.

A name stands here as Prometheus' text has it without ``_total``. The table knows no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL_LABELS = ("model_name", "engine")

TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_GAP_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
FINE_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
)  # fmt: skip
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class CounterSpec:
    meaning: str
    labels: tuple[str, ...] = MODEL_LABELS
    always: tuple[tuple[str, ...], ...] = ((),)
    """Values of the labels behind the model's that are shown from the start, at 0."""


@dataclass(frozen=True, slots=True)
class HistogramSpec:
    meaning: str
    buckets: tuple[float, ...]
    labels: tuple[str, ...] = MODEL_LABELS
    always: tuple[tuple[str, ...], ...] = ((),)


COUNTERS = {
    "vllm:prefix_cache_queries": CounterSpec("Prompt tokens looked up in the prefix cache."),
    "vllm:prefix_cache_hits": CounterSpec("Prompt tokens found in the prefix cache."),
    "vllm:prompt_tokens": CounterSpec("Tokens of prompts that were completed, cached ones included."),
    "vllm:prompt_tokens_cached": CounterSpec("Prompt tokens of finished sequences that came from the cache."),
    "vllm:generation_tokens": CounterSpec("Tokens generated."),
    "vllm:num_preemptions": CounterSpec(
        "Times that a sequence gave its KV blocks back to be computed again."
    ),
    "vllm:corrupted_requests": CounterSpec("Sequences that ended because the model gave NaN."),
    "vllm:request_success": CounterSpec(
        "Sequences ended, by reason.",
        (*MODEL_LABELS, "finished_reason"),
        (("stop",), ("length",), ("abort",), ("error",)),
    ),
    "vllm:admission_rejections": CounterSpec(
        "Requests refused because the server was full, by what there was too much of.",
        ("model_name", "reason"),
        (("requests",), ("tokens",)),
    ),
    "timbre_cancelled": CounterSpec(
        "Sequences whose client left, by what they were at.",
        ("where",),
        (("queued",), ("prefill",), ("decode",)),
    ),
    "timbre_store_errors": CounterSpec("Failures of the store itself, by what it was asked.", ("op",), ()),
    "timbre_requests": CounterSpec(
        "HTTP requests by route and status; probes are left out.", ("route", "code"), ()
    ),
    "timbre_adapter_loads": CounterSpec(
        "Adapters brought into memory, or not.", ("result",), (("ok",), ("failed",))
    ),
    "timbre_adapter_evictions": CounterSpec(
        "Adapters that left memory, for room or because they were dropped.",
        ("reason",),
        (("evicted",), ("unloaded",)),
    ),
    "timbre_upload": CounterSpec("Uploads of adapters by result.", ("result",), (("ok",), ("refused",))),
    "timbre_recipes": CounterSpec("Recipes by kind and result.", ("kind", "result"), ()),
    "timbre_upload_bytes": CounterSpec("Bytes of adapters stored.", ()),
}

ADAPTER_COUNTERS = (
    ("timbre_adapter_requests", "Sequences ended, by adapter; a mix counts for each of its adapters."),
    ("timbre_adapter_prompt_tokens", "Prompt tokens of those whose prompt was completed, by adapter."),
    ("timbre_adapter_generation_tokens", "Tokens generated for them, by adapter."),
)
"""The columns of the per-adapter table. ``_other`` holds all that are not among the most recent."""


EXPERT_TOKENS = (
    "timbre_expert_tokens",
    "Times that an expert acted on a token, by mixture and expert, over all places where it routes.",
)


def histograms(max_model_len: int) -> dict[str, HistogramSpec]:
    """All histograms; those of lengths have buckets up to the longest sequence."""
    lengths = one_two_five(max_model_len)
    return {
        "vllm:time_to_first_token_seconds": HistogramSpec("Arrival to first token.", TTFT_S),
        "vllm:inter_token_latency_seconds": HistogramSpec("Between two tokens of a sequence.", TOKEN_GAP_S),
        "vllm:request_time_per_output_token_seconds": HistogramSpec(
            "Mean time per token after a sequence's first.", TOKEN_GAP_S
        ),
        "vllm:e2e_request_latency_seconds": HistogramSpec("Arrival to end.", REQUEST_S),
        "vllm:request_queue_time_seconds": HistogramSpec("Arrival to the first step.", REQUEST_S),
        "vllm:request_prefill_time_seconds": HistogramSpec("First step to first token.", REQUEST_S),
        "vllm:request_inference_time_seconds": HistogramSpec("First step to end.", REQUEST_S),
        "vllm:request_decode_time_seconds": HistogramSpec("First token to end.", REQUEST_S),
        "vllm:request_prompt_tokens": HistogramSpec("Prompt tokens of a sequence.", lengths),
        "vllm:request_generation_tokens": HistogramSpec("Tokens generated for a sequence.", lengths),
        "vllm:request_params_max_tokens": HistogramSpec("The max_tokens asked for.", lengths),
        "vllm:request_params_n": HistogramSpec("The n asked for.", CHOICES),
        "vllm:iteration_tokens_total": HistogramSpec("Tokens in one engine step.", STEP_TOKENS),
        "timbre_time_to_first_token_seconds": HistogramSpec(
            "Arrival to first token, in finer buckets.", FINE_S
        ),
        "timbre_inter_token_latency_seconds": HistogramSpec("Between two tokens, in finer buckets.", FINE_S),
        "timbre_engine_step_seconds": HistogramSpec("Duration of one engine step.", FINE_S, ()),
        "timbre_batch_distinct_adapters": HistogramSpec(
            "Different adapters in one engine step.", DISTINCT, ()
        ),
        "timbre_adapter_load_seconds": HistogramSpec(
            "Bringing one adapter into memory, by phase.",
            FINE_S,
            ("phase",),
            (("verify",), ("compile",), ("place",), ("prepare",)),
        ),
    }


def one_two_five(largest: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, ... as far as ``largest``."""
    bounds: list[float] = []
    decade = 1
    while decade <= largest:
        bounds += [factor * decade for factor in (1, 2, 5) if factor * decade <= largest]
        decade *= 10
    return tuple(bounds)
