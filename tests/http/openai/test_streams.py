"""Streams: the same as single answers, well formed, kept alive, and ended when the client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timbre_server.engine.messages import TokenEvent
from timbre_server.http.sse import EventStreamResponse, encoded, unless_disconnected

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TEXTS = st.text(st.sampled_from("ab ") | st.sampled_from("hell😀é\u0301👩‍🚀"), max_size=24)


@given(
    texts=st.lists(TEXTS, min_size=1, max_size=3),
    stops=st.lists(st.text("ab h😀", min_size=1, max_size=3), max_size=4),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    include=st.booleans(),
    max_tokens=st.integers(1, 40),
)
@settings(max_examples=30)
async def test_a_stream_says_what_a_single_answer_says(
    make_rig: Callable[[], Any],
    texts: list[str],
    stops: list[str],
    sizes: list[int],
    include: bool,
    max_tokens: int,
) -> None:
    fields = {
        "n": len(texts), "seed": 0, "stop": stops, "max_tokens": max_tokens, "return_token_ids": True,
        "include_stop_str_in_output": include,
    }  # fmt: skip

    def rig_with(event_sizes: list[int]) -> Any:
        rig = make_rig()
        rig.engine.event_sizes = [*event_sizes, *[1] * 99]
        rig.engine.reply = lambda submit: rig.context.text.encode(
            texts[submit.sampling.seed], add_special_tokens=False
        )
        return rig

    whole = await rig_with([]).complete(**fields, logprobs=1)
    rig = rig_with(sizes)
    events = await rig.stream(COMPLETIONS, **fields, logprobs=1, stream_options={"include_usage": True})
    for choice in whole["choices"]:
        parts = [part for event in events for part in event["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for key, values in choice["logprobs"].items():
            assert [value for part in parts for value in part["logprobs"][key]] == values
        assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        assert parts[-1]["stop_reason"] == choice["stop_reason"]
        if choice["finish_reason"] == "stop":
            assert "\ufffd" not in choice["text"]
    assert events[-1]["usage"] == whole["usage"]
    assert rig.gate.held == []

    chat_whole = await rig_with([]).chat(**fields)
    chat_events = await rig_with(sizes).stream(CHAT, **fields)
    for choice in chat_whole["choices"]:
        parts = [
            part for event in chat_events for part in event["choices"] if part["index"] == choice["index"]
        ]
        assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
        assert choice["message"]["content"] == whole["choices"][choice["index"]]["text"]


async def test_usage_comes_once_at_the_end_and_is_null_before(rig: Any) -> None:
    for path in (COMPLETIONS, CHAT):
        events = await rig.stream(path, stream_options={"include_usage": True}, max_tokens=3)
        assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 3
        assert [event for event in events[:-1] if not event["choices"]] == []


async def test_usage_can_come_with_every_event_or_not_at_all(rig: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await rig.stream(COMPLETIONS, stream_options=options, max_tokens=3)
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 3]
    plain = await rig.stream(COMPLETIONS, max_tokens=3)
    assert all("usage" not in event and event["choices"] for event in plain)


async def test_chat_begins_with_the_role_and_ends_with_an_empty_delta(rig: Any) -> None:
    events = await rig.stream(CHAT)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert all(set(delta) == {"content"} for delta in deltas[1:-1])
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1


async def test_an_echoed_prompt_comes_with_the_first_event(rig: Any) -> None:
    events = await rig.stream(COMPLETIONS, prompt="abc", echo=True, logprobs=0, max_tokens=2)
    first = events[0]["choices"][0]
    assert first["text"] == "abchell"
    assert first["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert events[1]["choices"][0]["logprobs"]["text_offset"] == [7]


@pytest.mark.parametrize(
    ("code", "status"),
    [("adapter_load_failed", 500), ("context_length_exceeded", 400), ("invalid_request", 400), ("odd", 500)],
)
async def test_a_failed_request_is_an_error_with_or_without_a_stream(
    rig: Any, code: str, status: int
) -> None:
    rig.engine.failure = TokenEvent("", finish_reason="error", error_code=code, error_message="it broke")
    expected = {"odd": "internal_error", "invalid_request": "invalid_value"}.get(code, code)
    found, error = await rig.refused()
    assert (found, error["code"], error["message"]) == (status, expected, "it broke")
    events = await rig.stream(COMPLETIONS)
    assert events[-1] == {"error": error}
    assert events[0]["choices"][0]["text"] == "hell"
    assert [record.finish_reason for record in rig.records] == ["error", "error"]
    assert rig.gate.held == []


async def test_one_failing_choice_ends_the_others(rig: Any) -> None:
    rig.engine.text = "x" * 400
    original = rig.engine._events

    def events(submit: Any) -> Any:
        if submit.request_id.endswith("-2"):
            return iter([TokenEvent(submit.request_id, finish_reason="abort")])
        return original(submit)

    rig.engine._events = events
    status, error = await rig.refused(n=4, max_tokens=400)
    assert (status, error["code"]) == (503, "aborted")
    ended = [record.finish_reason for record in rig.records]
    assert sorted(ended) == ["abort", "abort", "abort", "error"]
    assert len(rig.engine.aborted) == 3


async def test_an_unknown_error_is_logged_and_the_client_learns_nothing_of_it(
    rig: Any, logged: list[Any]
) -> None:
    def events(_: Any) -> Any:
        raise RuntimeError("secret")

    rig.engine._events = events
    for stream in (False, True):
        response = await rig.post(COMPLETIONS, model="tiny-base", prompt="x", stream=stream)
        assert "internal_error" in response.text
        assert "secret" not in response.text
    assert [(entry["event"], entry["error"]) for entry in logged] == [
        ("request_failed", "RuntimeError"),
        ("stream_failed", "RuntimeError"),
    ]
    assert rig.gate.held == []


class Visitor:
    """The ASGI side of a client: reads events as they come, and leaves when told to."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "http.request", "body": orjson.dumps(body), "more_body": False})
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        return await self._messages.get()

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.arrived.set()

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    def start(self, app: Any, path: str) -> asyncio.Task[None]:
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "headers": [(b"content-type", b"application/json")], "client": ("test", 1),
            "server": ("test", 80), "state": {},
        }  # fmt: skip
        return asyncio.create_task(app(scope, self.receive, self.send))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_engines_work(rig: Any, path: str, n: int, stream: bool) -> None:
    rig.engine.gate = asyncio.Event()
    body = {"model": "tiny-base", "prompt": "x", "n": n, "stream": stream, "max_tokens": 8}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    visitor = Visitor(body)
    serving = visitor.start(rig.app, path)
    while len(rig.engine.submitted) < n:
        await asyncio.sleep(0)
    if stream:
        await visitor.arrived.wait()
    visitor.leave()
    await serving
    assert sorted(rig.engine.aborted) == sorted(submit.request_id for submit in rig.engine.submitted)
    assert [record.finish_reason for record in rig.records] == ["abort"] * n
    assert rig.gate.held == []


async def test_a_server_that_is_cancelled_leaves_nothing_behind(rig: Any) -> None:
    rig.engine.gate = asyncio.Event()
    visitor = Visitor({"model": "tiny-base", "prompt": "x", "stream": True, "n": 2})
    serving = visitor.start(rig.app, COMPLETIONS)
    await visitor.arrived.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert len(rig.engine.aborted) == 2
    assert rig.gate.held == []


async def test_a_client_that_cannot_be_written_to_ends_the_stream(rig: Any) -> None:
    visitor = Visitor({"model": "tiny-base", "prompt": "x", "stream": True})

    async def broken_send(message: Any) -> None:
        if message["type"] == "http.response.body":
            raise OSError("gone")

    visitor.send = broken_send  # type: ignore[method-assign]
    serving = visitor.start(rig.app, COMPLETIONS)
    with pytest.raises(OSError, match="gone"):
        await serving
    assert len(rig.engine.aborted) == 1
    assert rig.gate.held == []


async def test_silence_is_filled_with_comments(rig: Any) -> None:
    rig.with_limits(keep_alive_s=0.001)
    rig.engine.gate = asyncio.Event()
    visitor = Visitor({"model": "tiny-base", "prompt": "x", "stream": True})
    serving = visitor.start(rig.app, COMPLETIONS)
    while [message.get("body") for message in visitor.sent].count(b": keep-alive\n\n") < 3:
        await asyncio.sleep(0.001)
    rig.engine.gate.set()
    await serving
    text = b"".join(message.get("body", b"") for message in visitor.sent).decode()
    assert text.endswith("data: [DONE]\n\n")
    said = "".join(
        orjson.loads(block[6:])["choices"][0]["text"]
        for block in text.split("\n\n")
        if block.startswith("data: {")
    )
    assert said == "hello wörld 😀!"


async def test_a_stream_that_is_never_begun_is_closed_all_the_same() -> None:
    closed: list[str] = []

    async def payloads() -> AsyncGenerator[dict[str, Any], None]:
        yield {"a": 1}

    response = EventStreamResponse(
        encoded(payloads()), headers={}, keep_alive_s=1.0, on_close=lambda: closed.append("closed")
    )

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(_: Any) -> None:
        await asyncio.Event().wait()

    await response({"type": "http"}, receive, send)
    assert closed == ["closed"]


async def test_work_that_ends_first_wins_and_its_error_is_passed_on() -> None:
    async def receive() -> dict[str, Any]:
        return await asyncio.get_running_loop().create_future()

    async def answer() -> int:
        return 7

    async def fail() -> int:
        raise ValueError("no")

    assert await unless_disconnected(receive, answer()) == 7
    with pytest.raises(ValueError, match="no"):
        await unless_disconnected(receive, fail())
