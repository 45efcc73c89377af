"""How much the server takes on at a time, and how long a body may be."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse

from timbre_server.errors import QueueFull
from timbre_server.http.limits import Admission, BodyLimit


def admission(rejected: list[str]) -> Admission:
    return Admission(max_requests=3, max_tokens=100, on_rejected=rejected.append)


def test_room_is_given_back_when_the_block_ends_or_fails() -> None:
    gate = admission([])
    with gate.hold(2, 60):
        assert (gate.num_requests, gate.num_tokens) == (2, 60)
    assert (gate.num_requests, gate.num_tokens) == (0, 0)
    with pytest.raises(ZeroDivisionError), gate.hold(2, 60):
        raise ZeroDivisionError
    assert (gate.num_requests, gate.num_tokens) == (0, 0)


@pytest.mark.parametrize(("num_requests", "num_tokens", "reason"), [(2, 10, "requests"), (1, 41, "tokens")])
def test_what_is_too_much_is_refused_and_counted(num_requests: int, num_tokens: int, reason: str) -> None:
    rejected: list[str] = []
    gate = admission(rejected)
    with gate.hold(2, 60):
        with pytest.raises(QueueFull), gate.hold(num_requests, num_tokens):
            pytest.fail("was let in")
        with gate.hold(1, 40):
            assert gate.num_requests == 3
    assert rejected == [reason]
    assert (gate.num_requests, gate.num_tokens) == (0, 0)


def test_a_request_larger_than_the_limit_runs_alone() -> None:
    gate = admission([])
    with gate.hold(5, 500), pytest.raises(QueueFull), gate.hold(1, 1):
        pytest.fail("was let in")


async def echo_length(scope: Any, receive: Any, send: Any) -> None:
    body = await Request(scope, receive).body()
    await JSONResponse(len(body))(scope, receive, send)


async def answers_first(scope: Any, receive: Any, send: Any) -> None:
    await JSONResponse("early")(scope, receive, send)
    while (await receive())["type"] == "http.request":
        pass


async def pieces(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 10


def client_of(app: Any) -> httpx2.AsyncClient:
    limited = BodyLimit(app, limit_of=lambda method, path: 1000 if path == "/large" else 100)
    transport = httpx2.ASGITransport(limited, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://t")


async def test_a_body_up_to_the_limit_arrives_whole() -> None:
    response = await client_of(echo_length).post("/", content=pieces(10))
    assert response.json() == 100


async def test_each_path_has_its_own_limit() -> None:
    assert (await client_of(echo_length).post("/large", content=b"x" * 101)).json() == 101


@pytest.mark.parametrize("declared", [True, False])
async def test_a_longer_body_is_answered_413(declared: bool) -> None:
    response = await client_of(echo_length).post("/", content=b"x" * 110 if declared else pieces(11))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")


async def test_an_answer_that_has_begun_is_not_answered_again() -> None:
    response = await client_of(answers_first).post("/", content=pieces(11))
    assert (response.status_code, response.json()) == (200, "early")
