"""One listening socket and uvicorn behind it: h11, one process, our own signals.

h11 because it bounds a request's headers; one process because ``/metrics`` and the engine belong to one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
CLOSING_S = 3


@dataclass(frozen=True, slots=True)
class ServerOptions:
    host: str = "127.0.0.1"
    port: int = 8000
    max_header_bytes: int = 64 << 10
    keep_alive_timeout_s: int = 5


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
                http="h11",
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


class _Uvicorn(uvicorn.Server):
    """Leaves signals to whoever drains."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
