"""A real socket: clients that send their request's head too slowly, and answers that take long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from timbre_server.http.server import HttpServer, ServerOptions

HEAD_TIMEOUT_S = 0.2
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
