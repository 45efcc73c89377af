"""One listening socket and uvicorn behind it: h11, one process, our own signals.

h11 because it bounds a request's headers; one process because ``/metrics`` and the engine belong to one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 2048
CLOSING_S = 3
LEAST_TAKEN_BYTES = 64 << 10
"""Of what waits for a client, within its time; where less waits than that, nearly all of it."""


@dataclass(frozen=True, slots=True)
class ServerOptions:
    host: str = "127.0.0.1"
    port: int = 8000
    max_header_bytes: int = 64 << 10
    keep_alive_timeout_s: int = 5
    head_timeout_s: float = 10.0
    write_timeout_s: float = 60.0
    """In which a client must take some of what waits for it."""


class HttpServer:
    """Listens from the moment it is made.

    Raises: OSError if the address cannot be had.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        self._socket = socket.create_server((options.host, options.port), family=family, backlog=BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                app,
                http=cast(
                    "type[asyncio.Protocol]",
                    partial(
                        Deadlines,
                        head_timeout_s=options.head_timeout_s,
                        write_timeout_s=options.write_timeout_s,
                    ),
                ),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=options.max_header_bytes,
                timeout_keep_alive=options.keep_alive_timeout_s,
                timeout_graceful_shutdown=CLOSING_S,
            )
        )

    async def run(self) -> None:
        """Serves until `stop`."""
        await self._uvicorn.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Stops listening; open connections have a few seconds."""
        self._uvicorn.should_exit = True


class Deadlines(H11Protocol):
    """Closes a connection on which a request's head has begun, or is due, and does not end in time.

    And aborts one whose client does not take what is written to it: whoever serves it then sees that the
    client has left, and gives up its place.
    """

    def __init__(self, *args: Any, head_timeout_s: float, write_timeout_s: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._head_timeout_s = head_timeout_s
        self._write_timeout_s = write_timeout_s
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unwatch()
        self._unwatch_writing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unwatch_writing()

    def _watch(self) -> None:
        """Between two requests without a byte the keep-alive timeout counts instead."""
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self._head_timeout_s, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _watch_writing(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        self._write_deadline = self.loop.call_later(self._write_timeout_s, self._abort_unless_taken, unsent)

    def _abort_unless_taken(self, unsent: int) -> None:
        """A large answer may take long, as long as it goes on. Nothing is added to it meanwhile."""
        if unsent - self.transport.get_write_buffer_size() < LEAST_TAKEN_BYTES:
            self.transport.abort()
        else:
            self._watch_writing()

    def _unwatch_writing(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever drains."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
