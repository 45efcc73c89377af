"""Probes for supervisors and balancers, and ``/metrics``. None of them waits for the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from timbre_server.http.drain import Lifecycle, Phase

Render = Callable[[str], tuple[bytes, str]]
"""From an ``Accept`` header: the metrics' text and its content type."""


class EngineHealth(Protocol):
    """What a probe asks of the engine, without waiting."""

    @property
    def alive(self) -> bool: ...

    def seconds_since_last_step(self) -> float:
        """0 without work."""
        ...


class Probes:
    """Live: the process answers, and the engine steps while it has work. Ready: it takes new requests."""

    def __init__(self, lifecycle: Lifecycle, *, stall_timeout_s: float) -> None:
        self._lifecycle = lifecycle
        self._stall_timeout_s = stall_timeout_s
        self._engine: EngineHealth | None = None

    def watch(self, engine: EngineHealth) -> None:
        """From now on the engine's health counts."""
        self._engine = engine

    def why_not_live(self) -> str | None:
        engine = self._engine
        if self._lifecycle.phase is Phase.FAILED or (engine is not None and not engine.alive):
            return "the engine has stopped"
        if engine is not None and engine.seconds_since_last_step() > self._stall_timeout_s:
            return f"the engine has work but took no step for {engine.seconds_since_last_step():.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        if self._lifecycle.phase is not Phase.SERVING:
            return str(self._lifecycle.phase.value)
        return self.why_not_live()


def probe_router(probes: Probes, render_metrics: Render) -> APIRouter:
    """``/health``, ``/livez``, ``/readyz``, the Open Inference Protocol's pair, and ``/metrics``."""
    router = APIRouter(tags=["probes"])

    @router.get("/livez")
    @router.get("/v2/health/live")
    async def live() -> Response:
        """The process works; it need not be restarted."""
        return _answer(probes.why_not_live())

    @router.get("/health")
    @router.get("/readyz")
    @router.get("/v2/health/ready")
    async def ready() -> Response:
        """The model is loaded and new requests are taken."""
        return _answer(probes.why_not_ready())

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format."""
        body, content_type = render_metrics(request.headers.get("accept", ""))
        return Response(body, media_type=None, headers={"content-type": content_type})

    return router


def _answer(reason: str | None) -> Response:
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse(
        {"status": "unavailable", "reason": reason}, status_code=503, headers={"Retry-After": "2"}
    )
