"""Which ``Host`` and ``Origin`` headers are answered.

A page in somebody's browser can send requests to servers on that person's machine: by a name that it makes
point there, or as a plain form. A server without keys has nothing else to tell such requests by.
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from timbre_server.http.errors import error_response


class HostGuard:
    """Middleware. ``"*"`` allows any host, ``"*.example.org"`` its subdomains; ports do not count.

    With ``check_origin`` a request that a page of another host has sent is refused as well.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str], check_origin: bool) -> None:
        self._app = app
        self._allowed = tuple(name.lower() for name in allowed)
        self._check_origin = check_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        hosts = _header(scope, b"host")
        origins = _header(scope, b"origin")
        if len(hosts) != 1 or not self._allows(_name(hosts[0])):
            await _refuse(
                f"the Host header {_shown(hosts)} is not one that is answered here; set --allowed-hosts"
            )(scope, receive, send)
        elif self._check_origin and not all(_is_same(origin, hosts[0]) for origin in origins):
            await _refuse(
                f"the request comes from a page of {_shown(origins)}; without API keys only own pages may"
            )(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allows(self, name: str) -> bool:
        return any(
            pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))
            for pattern in self._allowed
        )


def _header(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def _name(host: str) -> str:
    """The host without its port; an IPv6 address keeps its brackets."""
    end = host.find("]") + 1 if host.startswith("[") else host.find(":")
    return (host[:end] if end > 0 else host).lower()


def _is_same(origin: str, host: str) -> bool:
    """Not a parser of URLs: what does not look like this host's own origin is another's."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def _shown(values: list[str]) -> str:
    return ", ".join(repr(value[:100]) for value in values[:2]) or "(none)"


def _refuse(message: str) -> ASGIApp:
    return error_response(403, "permission_error", "not_allowed", f"Refused: {message}.")
