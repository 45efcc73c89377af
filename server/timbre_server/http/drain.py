"""The server's life: loading, serving, draining, closed. And how it ends without cutting anybody off.

On SIGTERM ``/readyz`` answers 503 at once while everything else still works, so that balancers can turn away;
after a lead new work is refused; running requests get their time; what is left then ends with an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum

from starlette.types import ASGIApp, Receive, Scope, Send

from timbre_server.errors import Draining, EngineDied, NotReady, ServerError
from timbre_server.http.errors import server_error_response

LAST_WORDS_S = 5.0
"""How long requests that were cut off may take to write their error events."""


class Phase(Enum):
    LOADING = "loading"
    SERVING = "serving"
    LEAVING = "leaving"
    """Told to stop; still takes work, but says that it is not ready."""
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


class Lifecycle:
    """The current phase and the number of requests at work. Lives on the event loop's thread."""

    def __init__(self) -> None:
        self.phase = Phase.LOADING
        self.num_open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def refusal(self) -> ServerError | None:
        """Why work is refused now, or None if it is not."""
        match self.phase:
            case Phase.SERVING | Phase.LEAVING:
                return None
            case Phase.LOADING:
                return NotReady("The model is loading; try again in a moment.", retry_after_s=2.0)
            case Phase.FAILED:
                return EngineDied("The engine has stopped; the server must be started again.")
            case _:
                return Draining(
                    "The server is draining before it stops; try another replica.", retry_after_s=5.0
                )

    def enter(self) -> None:
        self.num_open += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether the last open request ended within the time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    async def drain(
        self, *, lead_s: float, timeout_s: float, end_the_rest: Callable[[], Awaitable[None]]
    ) -> None:
        """Ends everything in order; returns when no request is open, or none will end any more."""
        if self.phase is Phase.SERVING:
            self.phase = Phase.LEAVING
            await asyncio.sleep(lead_s)
        self.phase = Phase.DRAINING
        idle = await self.wait_idle(timeout_s)
        await end_the_rest()
        if not idle:
            await self.wait_idle(LAST_WORDS_S)
        self.phase = Phase.CLOSED


class WorkGate:
    """Middleware: counts open requests, and refuses them unless the server serves. Free paths just pass."""

    def __init__(self, app: ASGIApp, *, lifecycle: Lifecycle, free_paths: frozenset[str]) -> None:
        self._app = app
        self._lifecycle = lifecycle
        self._free_paths = free_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._free_paths:
            await self._app(scope, receive, send)
            return
        if refusal := self._lifecycle.refusal():
            await server_error_response(refusal)(scope, receive, send)
            return
        self._lifecycle.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._lifecycle.leave()
