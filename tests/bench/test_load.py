"""The load generator's arithmetic, on answers with known times, and on a server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import httpx2
import pytest
from load import Job, Timing, disagreement, figures, openai_body, percentile, request

JOB = Job("a", (7, 8, 9), 2)
USAGE = {"prompt_tokens": 3, "completion_tokens": 2}


def answer(first: float, last: float, tokens: int, started: float = 0.0) -> Timing:
    """Evenly spaced tokens, one a chunk."""
    step = (last - first) / (tokens - 1)
    arrivals = tuple((first + i * step, 1) for i in range(tokens))
    return Timing(started, arrivals, last, prompt_tokens=10)


def test_a_percentile_is_the_smallest_value_that_the_share_does_not_exceed() -> None:
    hundred = [float(i) for i in range(100, 0, -1)]
    assert [percentile(hundred, share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3
    assert percentile([1.0, 2.0], 0.5) == 1
    assert math.isnan(percentile([], 0.5))


def test_decode_counts_what_came_while_all_streams_were_decoding() -> None:
    early, late = answer(1.0, 5.0, 5), answer(2.0, 8.0, 7)
    found = figures("decode", [early, late])
    assert found.tokens_per_s == pytest.approx((3 + 3) / 3)
    assert found.itl_ms == pytest.approx((1000, 1000, 1000))
    assert found.ttft_ms == (1000, 2000, 2000)
    assert found.e2e_ms == (5000, 8000, 8000)


def test_decode_without_such_a_moment_has_no_figure() -> None:
    assert math.isnan(figures("decode", [answer(1.0, 2.0, 2), answer(3.0, 4.0, 2)]).tokens_per_s)


def test_prefill_counts_prompts_and_mixed_counts_tokens_over_the_whole_time() -> None:
    timings = [answer(2.0, 3.0, 4, started=1.0), answer(3.0, 5.0, 4, started=1.0)]
    assert figures("prefill", timings).tokens_per_s == 20 / 4
    assert figures("mixed", timings).tokens_per_s == 8 / 4


def test_a_request_with_an_error_is_counted_and_left_out() -> None:
    failed = Timing(0.0, ((50.0, 9),), 100.0, 10, "a: it broke")
    found = figures("mixed", [answer(1.0, 3.0, 3), failed])
    assert (found.errors, found.first_error, found.tokens_per_s) == (1, "a: it broke", 1.0)
    assert math.isnan(figures("mixed", [failed]).tokens_per_s)


@pytest.mark.parametrize(
    ("streamed", "usage", "says"),
    [
        (2, USAGE, None),
        (None, USAGE, None),
        (3, USAGE, "3 tokens came, usage counts 2"),
        (2, None, "without usage"),
        (1, USAGE | {"completion_tokens": 1}, "1 tokens, 2 were asked for"),
        (2, USAGE | {"prompt_tokens": 4}, "4 tokens of the prompt, 3 were sent"),
    ],
)
def test_usage_is_held_against_the_stream_and_the_request(
    streamed: int | None, usage: dict[str, int] | None, says: str | None
) -> None:
    found = disagreement(JOB, streamed, usage)
    assert found == says or (says is not None and found is not None and says in found)


def event(**fields: object) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def tokens(*ids: int) -> bytes:
    return event(choices=[{"text": "x", "token_ids": list(ids)}])


LAST = event(choices=[], usage=USAGE)


@pytest.mark.parametrize(
    ("sent", "says"),
    [
        ([tokens(1), tokens(2), LAST], None),
        ([tokens(1, 2), LAST, b"data: [DONE]\n\n"], None),
        ([tokens(1), LAST], "1 tokens came, usage counts 2"),
        ([event(choices=[{"text": "x"}]), LAST], None),
        ([tokens(1), event(error={"message": "the engine died"})], "the engine died"),
        ([tokens(1), tokens(2)], "without usage"),
        ([b"data: {not json\n\n"], "JSONDecodeError"),
    ],
)
async def test_a_stream_is_read_to_its_end_and_checked(sent: list[bytes], says: str | None) -> None:
    found = await ask(lambda scope, receive, send: stream(send, sent))
    assert (found.error is None) if says is None else (says in (found.error or ""))


async def test_a_refusal_is_an_error_with_the_servers_words() -> None:
    async def refuse(scope: object, receive: object, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"no such model"})

    found = await ask(refuse)
    assert found.error == "a: ValueError: status 404: no such model"


Send = Callable[[dict[str, object]], Awaitable[None]]


async def stream(send: Send, parts: list[bytes]) -> None:
    async def all_parts() -> AsyncIterator[bytes]:
        for part in parts:
            yield part
            await asyncio.sleep(0)

    await send({"type": "http.response.start", "status": 200, "headers": []})
    async for part in all_parts():
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def ask(app: Callable[..., Awaitable[None]]) -> Timing:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        return await request(client, JOB, openai_body(JOB))
