"""What supervisors and balancers are told, in each phase of the server's life."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from timbre_server.http.drain import Phase

LIVE = ("/livez", "/v2/health/live")
READY = ("/health", "/readyz", "/v2/health/ready")


async def statuses(served: Any) -> tuple[set[int], set[int]]:
    live = {(await served.client.get(path)).status_code for path in LIVE}
    return live, {(await served.client.get(path)).status_code for path in READY}


@pytest.mark.parametrize(
    ("phase", "live", "ready"),
    [
        (Phase.LOADING, 200, 503), (Phase.SERVING, 200, 200), (Phase.LEAVING, 200, 503),
        (Phase.DRAINING, 200, 503), (Phase.CLOSED, 200, 503), (Phase.FAILED, 503, 503),
    ],
)  # fmt: skip
async def test_each_phase_has_its_answers(
    serve: Callable[..., Any], phase: Phase, live: int, ready: int
) -> None:
    served = serve()
    served.lifecycle.phase = phase
    assert await statuses(served) == ({live}, {ready})


async def test_a_dead_engine_is_neither_live_nor_ready(serve: Callable[..., Any]) -> None:
    served = serve()
    served.engine.alive = False
    assert await statuses(served) == ({503}, {503})


@pytest.mark.parametrize(("seconds", "status"), [(0.0, 200), (29.0, 200), (31.0, 503)])
async def test_an_engine_without_steps_is_stalled(
    serve: Callable[..., Any], seconds: float, status: int
) -> None:
    served = serve()
    served.engine.idle_seconds = seconds
    assert await statuses(served) == ({status}, {status})


async def test_probes_and_metrics_are_not_counted_as_requests(serve: Callable[..., Any]) -> None:
    served = serve()
    for path in (*LIVE, *READY, "/metrics"):
        assert (await served.client.get(path)).status_code == 200
    assert served.answered == []
