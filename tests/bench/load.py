"""Streams of requests at a fixed concurrency, timed from outside through HTTP.

Every stream sends one request after another and reads its answer as it comes. A `Timing` keeps when each
chunk came and how many tokens it held, and `figures` makes a round's numbers of them. What a server says of
itself is checked: the tokens that came against those that ``usage`` counts and against those asked for. A
request that fails or does not agree is an error, and no number of it is used.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

RECEIVE_TIMEOUT_S = 600.0
SHARES = (0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Job:
    """One request: whom it asks, the prompt's token ids, and how many tokens it wants."""

    model: str
    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True)
class Timing:
    """One answer, in seconds of one clock; ``arrivals`` are (when, how many tokens)."""

    started_s: float
    arrivals: tuple[tuple[float, int], ...]
    ended_s: float
    prompt_tokens: int
    error: str | None = None


@dataclass(frozen=True)
class Figures:
    """One round of a scenario. Times are of requests without errors; NaN where there are none."""

    tokens_per_s: float
    ttft_ms: tuple[float, ...]
    itl_ms: tuple[float, ...]
    e2e_ms: tuple[float, ...]
    """p50, p90 and p99 each."""
    errors: int
    first_error: str | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


Body = Callable[[Job], Mapping[str, Any]]
"""A request as one server wants it."""


def openai_body(job: Job) -> dict[str, Any]:
    """As OpenAI's API, vLLM's and ours have it, with the ids of the tokens, so that they can be counted."""
    return {
        "model": job.model,
        "prompt": list(job.prompt),
        "max_tokens": job.new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }


async def run(url: str, streams: Sequence[Sequence[Job]], body: Body = openai_body) -> list[Timing]:
    """All jobs, each stream's one after another."""
    limits = httpx2.Limits(max_connections=len(streams), max_keepalive_connections=len(streams))
    async with httpx2.AsyncClient(base_url=url, timeout=RECEIVE_TIMEOUT_S, limits=limits) as client:

        async def one_by_one(jobs: Sequence[Job]) -> list[Timing]:
            return [await request(client, job, body(job)) for job in jobs]

        found = await asyncio.gather(*map(one_by_one, streams))
    return [timing for timings in found for timing in timings]


async def request(client: httpx2.AsyncClient, job: Job, body: Mapping[str, Any]) -> Timing:
    arrivals: list[tuple[float, int]] = []
    told_ids, usage, error = False, None, None
    started_s = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=dict(body)) as answer:
            if answer.status_code != 200:
                text = (await answer.aread()).decode(errors="replace")
                raise ValueError(f"status {answer.status_code}: {text[:300]}")
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now_s = time.perf_counter()
                event = json.loads(line.removeprefix("data: "))
                if event.get("error"):
                    raise ValueError(str(event["error"])[:300])
                for choice in event.get("choices") or ():
                    told_ids |= "token_ids" in choice
                    count = len(choice.get("token_ids") or ()) if told_ids else int(bool(choice.get("text")))
                    if count:
                        arrivals.append((now_s, count))
                usage = event.get("usage") or usage
        error = disagreement(job, sum(n for _, n in arrivals) if told_ids else None, usage)
    except (httpx2.HTTPError, ValueError) as failure:
        error = f"{type(failure).__name__}: {failure}"
    error = None if error is None else f"{job.model}: {error}"
    return Timing(started_s, tuple(arrivals), time.perf_counter(), len(job.prompt), error)


def disagreement(job: Job, streamed: int | None, usage: Mapping[str, Any] | None) -> str | None:
    """Where the stream (None: it names no tokens), ``usage`` and what was asked for do not say the same."""
    if usage is None:
        return "the stream ended without usage"
    if usage["completion_tokens"] != job.new_tokens:
        return f"usage counts {usage['completion_tokens']} tokens, {job.new_tokens} were asked for"
    if streamed is not None and streamed != usage["completion_tokens"]:
        return f"{streamed} tokens came, usage counts {usage['completion_tokens']}"
    if usage["prompt_tokens"] != len(job.prompt):
        return f"usage counts {usage['prompt_tokens']} tokens of the prompt, {len(job.prompt)} were sent"
    return None


def figures(kind: str, timings: Sequence[Timing]) -> Figures:
    """Tokens/s are: of ``decode``, those that came while every stream was decoding; of ``prefill``, the
    prompts' over the time of all; of ``mixed``, those that came over the time of all."""
    good = [timing for timing in timings if timing.error is None]
    errors = [timing.error for timing in timings if timing.error is not None]
    if not good:
        nothing = (math.nan,) * len(SHARES)
        return Figures(math.nan, nothing, nothing, nothing, len(errors), errors[0] if errors else None)
    window = _all_decode(good) if kind == "decode" else (-math.inf, math.inf)
    if kind == "decode":
        came = sum(n for t in good for when, n in t.arrivals if window[0] < when <= window[1])
        tokens_per_s = came / (window[1] - window[0]) if window[1] > window[0] else math.nan
    else:
        seconds = max(t.ended_s for t in good) - min(t.started_s for t in good)
        whole = sum(t.prompt_tokens if kind == "prefill" else sum(n for _, n in t.arrivals) for t in good)
        tokens_per_s = whole / seconds
    gaps = [
        later - earlier
        for t in good
        for (earlier, _), (later, _) in zip(t.arrivals, t.arrivals[1:], strict=False)
        if earlier >= window[0] and later <= window[1]
    ]
    return Figures(
        tokens_per_s=tokens_per_s,
        ttft_ms=_percentiles_ms(t.arrivals[0][0] - t.started_s for t in good),
        itl_ms=_percentiles_ms(gaps),
        e2e_ms=_percentiles_ms(t.ended_s - t.started_s for t in good),
        errors=len(errors),
        first_error=errors[0] if errors else None,
    )


def _all_decode(timings: Sequence[Timing]) -> tuple[float, float]:
    """From when the last of the streams had its first token to when the first of them had its last."""
    return max(t.arrivals[0][0] for t in timings), min(t.arrivals[-1][0] for t in timings)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all do not exceed (nearest rank); NaN of none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _percentiles_ms(seconds: Iterable[float]) -> tuple[float, ...]:
    found = list(seconds)
    return tuple(1e3 * percentile(found, share) for share in SHARES)
