"""A real socket: clients that send their request's head too slowly, or read nothing, and long answers."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from timbre_server.http.server import Deadlines, HttpServer, ServerOptions
from timbre_server.http.sse import EventStreamResponse

HEAD_TIMEOUT_S = 0.2
WRITE_TIMEOUT_S = 0.2
WHOLE = b"GET / HTTP/1.1\r\nHost: t\r\n\r\n"


async def answer_late(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(3 * HEAD_TIMEOUT_S)
    await PlainTextResponse("late")(scope, receive, send)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = HttpServer(answer_late, ServerOptions(port=0, head_timeout_s=HEAD_TIMEOUT_S))
    running = asyncio.create_task(server.run())
    yield server.port
    server.stop()
    await running


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: t\r\nX: "])
async def test_a_head_that_does_not_end_in_time_ends_the_connection(port: int, begun: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(begun)
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()


async def test_an_answer_may_take_longer_and_the_next_head_is_watched_again(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(WHOLE)
        assert (await reader.readuntil(b"late")).startswith(b"HTTP/1.1 200")
    writer.write(WHOLE[:-2])
    assert await asyncio.wait_for(reader.read(), 30) == b""
    writer.close()


class Endless:
    """Streams without end, and notes when it was closed."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        response = EventStreamResponse(
            self._events(), headers={}, keep_alive_s=1000.0, on_close=self.closed.set
        )
        await response(scope, receive, send)

    async def _events(self) -> AsyncGenerator[bytes, None]:
        while True:
            yield b"x" * 4096
            await asyncio.sleep(0)


async def test_a_client_that_takes_nothing_has_left() -> None:
    app = Endless()
    server = HttpServer(app, ServerOptions(port=0, write_timeout_s=WRITE_TIMEOUT_S))
    running = asyncio.create_task(server.run())
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(WHOLE)
        await asyncio.wait_for(app.closed.wait(), 30)
    server.stop()
    await running


class Transport(asyncio.Transport):
    """A connection whose other side takes what a test says."""

    unsent = 1 << 20
    is_aborted = False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def abort(self) -> None:
        self.is_aborted = True


class Clock:
    """An event loop as far as timers go: those that are set, and not cancelled."""

    def __init__(self) -> None:
        self.timers: list[Callable[[], None]] = []

    def call_later(self, _: float, callback: Callable[..., None], *args: object) -> Any:
        def due() -> None:
            self.timers.remove(due)
            callback(*args)

        self.timers.append(due)
        return SimpleNamespace(cancel=lambda: self.timers.remove(due))


def test_a_large_answer_may_take_long_as_long_as_it_is_taken() -> None:
    clock, transport = Clock(), Transport()
    connection = Deadlines(
        uvicorn.Config(answer_late, log_config=None),
        ServerState(),
        {},
        cast("Any", clock),
        head_timeout_s=1.0,
        write_timeout_s=1.0,
    )
    connection.connection_made(transport)
    [head] = clock.timers
    connection.pause_writing()
    for taken in (1 << 18, 1 << 16):
        transport.unsent -= taken
        [_, due] = clock.timers
        due()
        assert not transport.is_aborted
    connection.resume_writing()
    assert clock.timers == [head]
    connection.pause_writing()
    transport.unsent -= (1 << 16) - 1
    clock.timers[-1]()
    assert transport.is_aborted
