"""What one server takes on: requests and tokens in it at a time, headers, and bytes in one request's body.

Knows no routes' meaning. Files are bounded by the upload routes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timbre_server.errors import QueueFull
from timbre_server.http.errors import error_response

MAX_HEADERS = 256


class Admission:
    """Counts requests and their tokens from admission until they end, and refuses what is too much.

    The engine's own queue is behind this gate, so its length is bounded by it. A request that is larger
    than the whole token limit is still let in when nothing else is here; otherwise it could never run.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        on_rejected: Callable[[str], None],
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._on_rejected = on_rejected
        self.num_requests = 0
        self.num_tokens = 0

    @contextmanager
    def hold(self, num_requests: int, num_tokens: int) -> Iterator[None]:
        """Holds room for some sequences and for their prompt and expected output tokens while the block runs.

        Raises: QueueFull where there is no room; nothing is held then.
        """
        if self.num_requests and self.num_requests + num_requests > self._max_requests:
            self._refuse("requests", f"{self.num_requests} of at most {self._max_requests} requests")
        if self.num_requests and self.num_tokens + num_tokens > self._max_tokens:
            self._refuse("tokens", f"requests of {self.num_tokens} of at most {self._max_tokens} tokens")
        self.num_requests += num_requests
        self.num_tokens += num_tokens
        try:
            yield
        finally:
            self.num_requests -= num_requests
            self.num_tokens -= num_tokens

    def _refuse(self, reason: str, found: str) -> None:
        self._on_rejected(reason)
        raise QueueFull(f"The server is full: it holds {found}. Try again, or another replica.")


class HeaderLimit:
    """Middleware that refuses a request with too many or too long headers.

    The parser bounds only what it must keep while headers are incomplete; a request that arrives in one
    piece is measured here.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_headers: int = MAX_HEADERS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_headers = max_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = scope["headers"]
            target = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
            length = target + sum(len(name) + len(value) for name, value in headers)
            if len(headers) > self._max_headers or length > self._max_bytes:
                await self._refusal(len(headers), length)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, count: int, length: int) -> ASGIApp:
        return error_response(
            431,
            "invalid_request_error",
            "too_large",
            f"The request has {count} headers of {length} bytes with its path; at most {self._max_headers} "
            f"headers and {self._max_bytes} bytes are read.",
            headers={"Connection": "close"},
        )


class BodyLimit:
    """Middleware that cuts a body off at a number of bytes, by ``Content-Length`` where there is one.

    ``limit_of(method, path)`` gives the number. The application behind it sees a client that left.
    """

    def __init__(self, app: ASGIApp, *, limit_of: Callable[[str, str], int]) -> None:
        self._app = app
        self._limit_of = limit_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._limit_of(scope["method"], scope["path"])
        if _declared_length(scope) > limit:
            await _too_large(limit)(scope, receive, send)
            return
        await _LimitedCall(self._app, limit)(scope, receive, send)


class _LimitedCall:
    """One request: counts what is received, and answers in the application's stead once it is too much."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit
        self._received = 0
        self._started = False

    def _is_over(self) -> bool:
        return self._received > self._limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting_receive() -> Message:
            if self._is_over():
                return {"type": "http.disconnect"}
            message: Message = await receive()
            self._received += len(message.get("body", b""))
            if not self._is_over():
                return message
            if not self._started:
                self._started = True
                await _too_large(self._limit)(scope, receive, send)
            return {"type": "http.disconnect"}

        async def guarded_send(message: Message) -> None:
            if not self._is_over():
                self._started = True
                await send(message)

        await self._app(scope, counting_receive, guarded_send)


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _too_large(limit: int) -> ASGIApp:
    return error_response(
        413,
        "invalid_request_error",
        "too_large",
        f"The request's body is larger than the {limit} bytes that are taken here.",
        headers={"Connection": "close"},
    )
