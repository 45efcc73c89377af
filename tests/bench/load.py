"""A stream of requests at a fixed concurrency, timed from outside through HTTP.

Each stream sends one request after another. Prompts are random token ids, new for every request, so that no
prefix is found in a cache; the end of sequence is ignored, so that every request yields the same count.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import httpx2

RECEIVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Scenario:
    """What runs: ``models`` are given to the requests in turn."""

    name: str
    streams: int
    models: tuple[str, ...]
    requests_per_stream: int = 2


@dataclass(frozen=True)
class Shape:
    """The size of every request."""

    prompt_tokens: int
    new_tokens: int
    vocab_size: int


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token, and to each next one."""

    ttft_s: float
    gaps_s: tuple[float, ...]
    completion_tokens: int


@dataclass(frozen=True)
class Figures:
    """One round of a scenario."""

    tokens_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 2) for name, value in asdict(self).items()}


async def run_scenario(url: str, scenario: Scenario, shape: Shape, seed: int) -> Figures:
    """Run one round. Raises RuntimeError for any answer that is not whole."""
    models = iter(
        scenario.models[i % len(scenario.models)]
        for i in range(scenario.streams * scenario.requests_per_stream)
    )
    chance = random.Random(seed)
    timings: list[Timing] = []

    async def stream(client: httpx2.AsyncClient) -> None:
        for model in models:
            prompt = [chance.randrange(100, shape.vocab_size) for _ in range(shape.prompt_tokens)]
            timings.append(await _request(client, model, prompt, shape.new_tokens))

    limits = httpx2.Limits(max_connections=scenario.streams)
    async with httpx2.AsyncClient(base_url=url, timeout=RECEIVE_TIMEOUT_S, limits=limits) as client:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(scenario.streams):
                tasks.create_task(stream(client))
        seconds = time.perf_counter() - start
    return _figures(timings, seconds)


async def _request(client: httpx2.AsyncClient, model: str, prompt: Sequence[int], new_tokens: int) -> Timing:
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    start = last = time.perf_counter()
    ttft, gaps, completion_tokens = 0.0, [], 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{model}: {answer.status_code} {(await answer.aread()).decode()}")
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event.get("error"):
                raise RuntimeError(f"{model}: {event['error']}")
            now = time.perf_counter()
            if event["choices"]:
                if ttft:
                    gaps.append(now - last)
                else:
                    ttft = now - start
                last = now
            elif event.get("usage"):
                completion_tokens = event["usage"]["completion_tokens"]
    if completion_tokens != new_tokens:
        raise RuntimeError(f"{model}: {completion_tokens} tokens came, {new_tokens} were asked for")
    return Timing(ttft, tuple(gaps), completion_tokens)


def _figures(timings: Sequence[Timing], seconds: float) -> Figures:
    first = sorted(timing.ttft_s for timing in timings)
    gaps = sorted(gap for timing in timings for gap in timing.gaps_s)
    return Figures(
        tokens_per_s=sum(timing.completion_tokens for timing in timings) / seconds,
        ttft_p50_ms=1e3 * statistics.median(first),
        ttft_p99_ms=1e3 * _percentile(first, 0.99),
        itl_p50_ms=1e3 * statistics.median(gaps),
        itl_p99_ms=1e3 * _percentile(gaps, 0.99),
    )


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
