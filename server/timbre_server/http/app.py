"""The application: middleware in its order, error answers, and routers. Knows no model and no store.

Outermost first: a request gets its id and is logged; its headers' size is checked, its Host, its key, whether
the server works at all, the size of its body; then it meets a route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp

from timbre_server.http.auth import METRICS_PATH, PROBE_PATHS, ApiKeyAuth
from timbre_server.http.drain import Lifecycle, WorkGate
from timbre_server.http.errors import install_error_handlers
from timbre_server.http.hosts import HostGuard
from timbre_server.http.limits import BodyLimit, HeaderLimit
from timbre_server.http.probes import Probes, Render, probe_router
from timbre_server.http.request_log import CLIENT_CLOSED, RequestLog
from timbre_server.http.upload import FORM_OVERHEAD_BYTES

UPLOAD_PATH = "/v1/adapters"
BLOB_PREFIX = "/v1/blobs/"


@dataclass(frozen=True, slots=True)
class AppOptions:
    api_keys: tuple[str, ...] = ()
    public_metrics: bool = False
    allowed_hosts: tuple[str, ...] = ("*",)
    max_body_bytes: int = 32 << 20
    max_upload_bytes: int = 512 << 20
    max_header_bytes: int = 64 << 10
    serve_openapi: bool = False

    @property
    def public_paths(self) -> frozenset[str]:
        """All that is answered without a key."""
        return PROBE_PATHS | {METRICS_PATH} if self.public_metrics else PROBE_PATHS

    def body_limit(self, method: str, path: str) -> int:
        """Bytes that a request's body may have."""
        if method == "PUT" and path.startswith(BLOB_PREFIX):
            return self.max_upload_bytes
        if method == "POST" and path == UPLOAD_PATH:
            return self.max_upload_bytes + self.max_body_bytes + FORM_OVERHEAD_BYTES
        return self.max_body_bytes


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What middleware and probes are given."""

    lifecycle: Lifecycle
    probes: Probes
    render_metrics: Render
    on_answered: Callable[[str, int], None]
    on_store_error: Callable[[str], None] = lambda operation: None


def create_app(options: AppOptions, surroundings: Surroundings) -> FastAPI:
    """An application that answers probes, and refuses everything else until it has routers and serves."""
    app = FastAPI(
        title="Timbre",
        openapi_url="/openapi.json" if options.serve_openapi else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    install_error_handlers(app, surroundings.on_store_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.include_router(probe_router(surroundings.probes, surroundings.render_metrics))
    free_paths = PROBE_PATHS | {METRICS_PATH}
    layers: tuple[Callable[[ASGIApp], ASGIApp], ...] = (
        lambda inner: BodyLimit(inner, limit_of=options.body_limit),
        lambda inner: WorkGate(inner, lifecycle=surroundings.lifecycle, free_paths=free_paths),
        lambda inner: ApiKeyAuth(inner, keys=options.api_keys, public_paths=options.public_paths),
        lambda inner: HostGuard(inner, allowed=options.allowed_hosts, check_origin=not options.api_keys),
        lambda inner: HeaderLimit(inner, max_bytes=options.max_header_bytes),
        lambda inner: RequestLog(inner, on_answered=surroundings.on_answered, quiet_paths=free_paths),
    )
    for layer in layers:
        app.add_middleware(layer)
    return app


def add_routes(app: FastAPI, routers: Iterable[APIRouter]) -> None:
    """Gives a running application its routes, once there is something behind them."""
    for router in routers:
        app.include_router(router)
    app.openapi_schema = None


async def _on_disconnect(_: Request, __: Exception) -> Response:
    """Nobody is there to read it; the log has the status."""
    return Response(status_code=CLIENT_CLOSED)
