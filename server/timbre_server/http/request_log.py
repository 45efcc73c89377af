"""One log line and one count for each request, and the ``x-request-id`` that ties them to the answer.

The id is the client's own where it sent a sane one. Lines carry route templates, never raw paths or bodies.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER = b"x-request-id"
UNMATCHED_ROUTE = "_unmatched"
CLIENT_CLOSED = 499
_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestLog:
    """Outermost middleware. Puts ``request_id`` into the request's state.

    ``on_answered(route, code)`` is called once a request. ``quiet_paths`` are neither logged nor counted.
    """

    def __init__(
        self, app: ASGIApp, *, on_answered: Callable[[str, int], None], quiet_paths: frozenset[str]
    ) -> None:
        self._app = app
        self._on_answered = on_answered
        self._quiet_paths = quiet_paths
        self._log = structlog.get_logger("timbre.http")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_CLOSED
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [pair for pair in message.get("headers", ()) if pair[0] != REQUEST_ID_HEADER]
                message = {**message, "headers": [*headers, (REQUEST_ID_HEADER, request_id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in self._quiet_paths:
                self._report(scope, request_id, status, time.monotonic() - began)

    def _report(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED_ROUTE)
        self._on_answered(route, status)
        fields = {"adapter": adapter} if (adapter := scope["state"].get("adapter")) else {}
        self._log.info(
            "request",
            request_id=request_id,
            method=scope["method"] if scope["method"].isalpha() else "?",
            route=route,
            status=status,
            seconds=round(seconds, 4),
            **fields,
        )


def _request_id(scope: Scope) -> str:
    given = [value for name, value in scope["headers"] if name == REQUEST_ID_HEADER]
    if len(given) == 1 and _SANE_ID.fullmatch(given[0]):
        return str(given[0], "ascii")
    return uuid.uuid4().hex
