"""From the first byte listened for to the exit status: start, signals, a dead engine, the drain.

It is handed what to start and what to end, and knows neither model nor store.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from timbre_server.http.drain import LAST_WORDS_S, Lifecycle, Phase
from timbre_server.http.server import HttpServer

EXIT_OK = 0
EXIT_ENGINE_DIED = 70
EXIT_BY_SIGNAL = 128
HEALTH_PERIOD_S = 0.5


@dataclass(frozen=True, slots=True)
class Supervised:
    """What is run beside the HTTP server."""

    start: Callable[[], Awaitable[None]]
    """Builds everything and sets the phase to serving. Whatever it raises ends the server."""
    is_alive: Callable[[], bool]
    """Asked now and then once the start is done."""
    close: Callable[[], Awaitable[None]]
    """Ends what is there; requests that are left end with an error. Called once, after a failed start too."""


class Supervisor:
    """Runs one server. SIGTERM drains; SIGINT drains without the lead; a second one exits at once."""

    def __init__(self, server: HttpServer, lifecycle: Lifecycle, *, lead_s: float, timeout_s: float) -> None:
        self._server = server
        self._lifecycle = lifecycle
        self._lead_s = lead_s
        self._timeout_s = timeout_s
        self._told_to_stop = asyncio.Event()
        self._log = structlog.get_logger("timbre.server")

    async def run(self, supervised: Supervised) -> int:
        """The process' exit status. Raises: what ``start`` raises."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        listening = asyncio.create_task(self._server.run())
        try:
            return await self._live(supervised)
        finally:
            self._server.stop()
            await listening

    async def _live(self, supervised: Supervised) -> int:
        stopping = asyncio.create_task(self._told_to_stop.wait())
        starting = asyncio.ensure_future(supervised.start())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done() or starting.exception() is not None:
            starting.cancel()
            await asyncio.wait({starting})
            await self._drain(supervised, lead_s=0, timeout_s=0)
            if not starting.cancelled():
                starting.result()
            return EXIT_OK
        while supervised.is_alive() and not stopping.done():
            await asyncio.wait({stopping}, timeout=HEALTH_PERIOD_S)
        if not stopping.done():
            self._log.error("engine_died")
            self._lifecycle.phase = Phase.FAILED
            await self._lifecycle.wait_idle(LAST_WORDS_S)
            await supervised.close()
            return EXIT_ENGINE_DIED
        await self._drain(supervised, lead_s=self._lead_s, timeout_s=self._timeout_s)
        return EXIT_OK

    async def _drain(self, supervised: Supervised, *, lead_s: float, timeout_s: float) -> None:
        self._log.info("draining", open_requests=self._lifecycle.num_open)
        await self._lifecycle.drain(lead_s=lead_s, timeout_s=timeout_s, end_the_rest=supervised.close)

    def _on_signal(self, number: int) -> None:
        if self._told_to_stop.is_set():
            os._exit(EXIT_BY_SIGNAL + number)
        if number == signal.SIGINT:
            self._lead_s = 0
        self._told_to_stop.set()
