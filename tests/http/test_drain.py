"""From loading to closed: what is answered on the way, and that nobody is cut off before the limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from timbre_server.http.drain import Lifecycle, Phase


@pytest.mark.parametrize(
    ("phase", "status", "code"),
    [
        (Phase.LOADING, 503, "loading"), (Phase.DRAINING, 503, "draining"), (Phase.CLOSED, 503, "draining"),
        (Phase.FAILED, 503, "engine_died"),
    ],
)  # fmt: skip
async def test_work_is_refused_outside_of_serving(
    serve: Callable[..., Any], phase: Phase, status: int, code: str
) -> None:
    served = serve()
    served.lifecycle.phase = phase
    response = await served.client.get("/v1/adapters")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert int(response.headers["retry-after"]) >= 1


async def test_while_it_leaves_it_still_works_but_is_not_ready(serve: Callable[..., Any]) -> None:
    served = serve()
    served.lifecycle.phase = Phase.LEAVING
    assert (await served.client.get("/v1/adapters")).status_code == 200
    assert (await served.client.get("/readyz")).json() == {"status": "unavailable", "reason": "leaving"}


async def test_an_application_without_routes_yet_says_that_it_is_loading(serve: Callable[..., Any]) -> None:
    response = await serve(serving=False).client.post("/v1/completions", json={})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "loading")


async def nothing() -> None:
    return None


async def test_a_drain_waits_for_the_last_request() -> None:
    lifecycle = Lifecycle()
    lifecycle.phase = Phase.SERVING
    lifecycle.enter()
    drained = asyncio.create_task(lifecycle.drain(lead_s=0, timeout_s=60, end_the_rest=nothing))
    while lifecycle.phase is not Phase.DRAINING:
        await asyncio.sleep(0)
    assert not drained.done()
    lifecycle.leave()
    await drained
    assert (lifecycle.phase, lifecycle.num_open) == (Phase.CLOSED, 0)


async def test_a_drain_is_unready_during_its_lead() -> None:
    lifecycle = Lifecycle()
    lifecycle.phase = Phase.SERVING
    drained = asyncio.create_task(lifecycle.drain(lead_s=3600, timeout_s=0, end_the_rest=nothing))
    await asyncio.sleep(0)
    assert (lifecycle.phase, lifecycle.refusal()) == (Phase.LEAVING, None)
    drained.cancel()


async def test_requests_beyond_the_limit_are_ended_and_may_say_so() -> None:
    lifecycle = Lifecycle()
    lifecycle.phase = Phase.SERVING
    lifecycle.enter()
    ended: list[Phase] = []

    async def end_the_rest() -> None:
        ended.append(lifecycle.phase)
        asyncio.get_running_loop().call_soon(lifecycle.leave)

    await lifecycle.drain(lead_s=0, timeout_s=0, end_the_rest=end_the_rest)
    assert (ended, lifecycle.phase, lifecycle.num_open) == ([Phase.DRAINING], Phase.CLOSED, 0)


async def test_a_server_that_never_served_leaves_without_a_lead() -> None:
    lifecycle = Lifecycle()
    await asyncio.wait_for(lifecycle.drain(lead_s=3600, timeout_s=0, end_the_rest=nothing), 60)
    assert lifecycle.phase is Phase.CLOSED
