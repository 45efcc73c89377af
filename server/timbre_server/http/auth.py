"""API keys: every path needs one unless it is in the list of public paths.

Decides on ``scope["path"]`` alone, never on a rebuilt URL, so no header can change what is guarded. Knows no
routes: a path that leads nowhere is refused like any other.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from timbre_server.http.errors import error_response

PROBE_PATHS = frozenset({"/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
METRICS_PATH = "/metrics"


class ApiKeyAuth:
    """Middleware. Without keys it lets everything through."""

    def __init__(
        self, app: ASGIApp, *, keys: Iterable[str], public_paths: frozenset[str] = PROBE_PATHS
    ) -> None:
        self._app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)
        self._public_paths = public_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            response = error_response(
                401,
                "authentication_error",
                "invalid_api_key",
                "No valid API key was given; expected the header 'Authorization: Bearer <key>'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await response(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allows(self, scope: Scope) -> bool:
        if not self._digests or (scope["type"] == "http" and scope["path"] in self._public_paths):
            return True
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return False
        scheme, _, key = values[0].partition(b" ")
        return scheme.lower() == b"bearer" and self._is_known(_digest(key.strip()))

    def _is_known(self, digest: bytes) -> bool:
        """Compares with every key, so that the time tells nothing of which one matched, or how far."""
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
