"""A real socket and real signals: one server from its first probe to its exit status."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial

import httpx2
import pytest
from fastapi import APIRouter, FastAPI
from starlette.responses import StreamingResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from timbre_server.errors import UnsupportedModel
from timbre_server.http.app import AppOptions, Surroundings, add_routes, create_app
from timbre_server.http.drain import Lifecycle, Phase
from timbre_server.http.probes import Probes
from timbre_server.http.server import HttpServer, ServerOptions
from timbre_server.http.supervision import EXIT_ENGINE_DIED, EXIT_OK, Supervised, Supervisor

SECOND_SIGNAL = """
import asyncio, os, signal
from timbre_server.http.drain import Lifecycle
from timbre_server.http.server import HttpServer, ServerOptions
from timbre_server.http.supervision import Supervised, Supervisor

async def app(scope, receive, send): ...

async def main():
    lifecycle = Lifecycle()
    supervisor = Supervisor(HttpServer(app, ServerOptions(port=0)), lifecycle, lead_s=3600, timeout_s=3600)
    async def start():
        lifecycle.phase = type(lifecycle.phase).SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
    async def close(): ...
    await supervisor.run(Supervised(start, lambda: True, close))

asyncio.run(main())
"""


class Process:
    """A supervised server with one route that streams until it may stop."""

    def __init__(self, *, lead_s: float = 0, timeout_s: float = 60) -> None:
        self.lifecycle = Lifecycle()
        self.app = self._application()
        self.http = HttpServer(self.app, ServerOptions(port=0))
        self.supervisor = Supervisor(self.http, self.lifecycle, lead_s=lead_s, timeout_s=timeout_s)
        self.streaming = asyncio.Event()
        self.may_end = asyncio.Event()
        self.alive = True
        self.closed = 0

    def _application(self) -> FastAPI:
        surroundings = Surroundings(
            self.lifecycle,
            Probes(self.lifecycle, stall_timeout_s=30),
            lambda _: (b"", "text/plain"),
            lambda *_: None,
        )
        router = APIRouter()

        @router.get("/stream")
        async def stream() -> StreamingResponse:
            return StreamingResponse(self._pieces())

        app = create_app(AppOptions(max_header_bytes=4096), surroundings)
        add_routes(app, [router])
        return app

    async def _pieces(self) -> AsyncIterator[bytes]:
        yield b"first "
        self.streaming.set()
        await self.may_end.wait()
        yield b"last"

    async def start(self) -> None:
        self.lifecycle.phase = Phase.SERVING

    async def close(self) -> None:
        self.closed += 1
        self.may_end.set()

    def run(self, start: Callable[..., object] | None = None) -> asyncio.Task[int]:
        supervised = Supervised(start or self.start, lambda: self.alive, self.close)  # type: ignore[arg-type]
        return asyncio.create_task(self.supervisor.run(supervised))

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(base_url=f"http://127.0.0.1:{self.http.port}")


async def until_serving(process: Process) -> None:
    while process.lifecycle.phase is not Phase.SERVING:
        await asyncio.sleep(0.01)


async def test_probes_are_answered_while_the_model_loads() -> None:
    process = Process()
    loading = asyncio.Event()

    async def start() -> None:
        await loading.wait()

    running = process.run(start)
    async with process.client() as client:
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).json()["reason"] == "loading"
        assert (await client.get("/stream")).json()["error"]["code"] == "loading"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await running == EXIT_OK
    assert process.closed == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_a_running_stream_finish_and_refuses_new_work(number: signal.Signals) -> None:
    process = Process()
    running = process.run()
    await until_serving(process)
    async with process.client() as client:
        stream = asyncio.create_task(client.get("/stream"))
        await process.streaming.wait()
        os.kill(os.getpid(), number)
        while process.lifecycle.phase is not Phase.DRAINING:
            await asyncio.sleep(0.01)
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/stream")).json()["error"]["code"] == "draining"
        process.may_end.set()
        assert (await stream).text == "first last"
    assert await running == EXIT_OK


async def test_a_stream_beyond_the_limit_is_ended_by_closing_the_engine() -> None:
    process = Process(timeout_s=0)
    running = process.run()
    await until_serving(process)
    async with process.client() as client:
        stream = asyncio.create_task(client.get("/stream"))
        await process.streaming.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        assert (await stream).text == "first last"
    assert (await running, process.closed) == (EXIT_OK, 1)


async def test_a_dead_engine_ends_the_process_with_its_own_status() -> None:
    process = Process()
    running = process.run()
    await until_serving(process)
    process.alive = False
    assert (await running, process.closed) == (EXIT_ENGINE_DIED, 1)


async def test_a_start_that_fails_is_raised_after_everything_is_closed() -> None:
    process = Process()

    async def start() -> None:
        raise UnsupportedModel("no such model")

    with pytest.raises(UnsupportedModel):
        await process.run(start)
    assert (process.closed, process.lifecycle.phase) == (1, Phase.CLOSED)


def test_a_second_signal_ends_the_process_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND_SIGNAL], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


async def status_of(process: Process, headers: dict[str, str]) -> int | None:
    """None: the connection was cut before the client had sent everything."""
    async with process.client() as client:
        try:
            return (await client.get("/livez", headers=headers)).status_code
        except httpx2.TransportError:
            return None


async def test_headers_beyond_the_limit_are_refused() -> None:
    process = Process()
    running = process.run()
    assert await status_of(process, {"X-Long": "x" * 5_000}) == 431
    assert await status_of(process, {f"X-{index}": "" for index in range(300)}) == 431
    assert await status_of(process, {"X-Long": "x" * 1_000_000}) in (400, 431, None)
    assert await status_of(process, {"X-Short": "x"}) == 200
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == EXIT_OK


async def test_the_parser_is_the_one_that_bounds_headers() -> None:
    process = Process()
    config = process.http._uvicorn.config
    config.load()
    assert isinstance(config.http_protocol_class, partial)
    assert issubclass(config.http_protocol_class.func, H11Protocol)
    assert config.workers == 1
    process.http._socket.close()
