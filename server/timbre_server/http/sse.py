"""Server-sent events: encoding, keep-alive comments, errors after the 200, and clients that leave.

Knows no answer formats. What is streamed is closed exactly once, however the response ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from timbre_server.errors import ServerError
from timbre_server.http.errors import body_of

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
CLIENT_CLOSED = 499
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

Result = TypeVar("Result")
log = structlog.stdlib.get_logger("timbre.http")


def encode_event(payload: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(payload) + b"\n\n"


async def encoded(payloads: AsyncGenerator[Mapping[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """The payloads as events, then ``[DONE]``. An error on the way is an event of its own before it."""
    try:
        async with aclosing(payloads) as open_payloads:
            async for payload in open_payloads:
                yield encode_event(payload)
    except Exception as error:  # the request boundary: the status was sent long ago
        if not isinstance(error, ServerError):
            log.exception("stream_failed", error=type(error).__name__)
        yield encode_event(body_of(error))
    yield DONE


class EventStreamResponse(Response):
    """Streams encoded events. ``on_close`` is called once, after the events were closed."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        headers: Mapping[str, str],
        keep_alive_s: float,
        on_close: Callable[[], None],
    ) -> None:
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._on_close = on_close
        self._silent_since_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await first_of(self._send_all(send), until_disconnected(receive))
        finally:
            try:
                await self._events.aclose()
            finally:
                self._on_close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._silent_since_s = time.monotonic()
        breaking_silence = asyncio.create_task(self._break_silence(send))
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._silent_since_s = time.monotonic()
        finally:
            await _cancel(breaking_silence)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_silence(self, send: Send) -> None:
        while True:
            left_s = self._silent_since_s + self._keep_alive_s - time.monotonic()
            if left_s > 0:
                await asyncio.sleep(left_s)
                continue
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            self._silent_since_s = time.monotonic()


async def until_disconnected(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The work's result, or None if the client left first; the work was then cancelled and has ended."""
    return await first_of(work, until_disconnected(receive))


async def first_of(work: Coroutine[Any, Any, Result], other: Awaitable[None]) -> Result | None:
    """The work's result, or None if the other ended before it. Neither runs any longer afterwards."""
    working = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(other)
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancel(working)
        await _cancel(waiting)


async def _cancel(future: asyncio.Future[Any]) -> None:
    """Cancels and waits until it has ended; its result is of no interest any longer."""
    future.cancel()
    await asyncio.gather(future, return_exceptions=True)
