"""The table of errors, and the bodies and headers that clients meet."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2
import pytest
from fastapi import FastAPI
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from timbre_methods.errors import MethodError
from timbre_server.errors import AdapterMismatch, AdapterNotFound, EngineDied, QueueFull, ServerError
from timbre_server.http.errors import (
    ERROR_KINDS,
    error_response,
    install_error_handlers,
    kind_of,
    server_error_response,
)
from timbre_store.errors import NotFound, StoreError, StoreFull

ROOTS = (ServerError, StoreError, MethodError)


def classes_below(root: type[Exception]) -> Iterator[type[Exception]]:
    for child in root.__subclasses__():
        yield child
        yield from classes_below(child)


LEAVES = [leaf for root in ROOTS for leaf in classes_below(root) if not leaf.__subclasses__()]


class Item(BaseModel):
    sizes: list[int]
    name: str = Field(max_length=3)


def app_raising(error: Exception) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/raise")
    async def fail() -> None:
        raise error

    @app.post("/items")
    async def take(item: Item) -> Item:
        return item

    return app


@pytest.mark.parametrize(
    ("error", "counted"), [(StoreFull("x"), ["GET /raise"]), (NotFound("x"), []), (QueueFull("x"), [])]
)
async def test_only_failures_of_the_store_itself_are_told(error: Exception, counted: list[str]) -> None:
    operations: list[str] = []
    app = app_raising(error)
    install_error_handlers(app, operations.append)
    await client_of(app).get("/raise")
    assert operations == counted


def client_of(app: FastAPI) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://timbre")


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: f"{leaf.__module__}.{leaf.__name__}")
def test_every_leaf_of_the_three_trees_has_its_own_entry(leaf: type[Exception]) -> None:
    assert leaf in ERROR_KINDS


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: f"{leaf.__module__}.{leaf.__name__}")
def test_every_leaf_is_answered_with_all_four_keys_and_its_message(leaf: type[Exception]) -> None:
    response = server_error_response(leaf("found 3, expected 4"))
    body = json.loads(response.body)
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] == "found 3, expected 4"
    assert response.status_code >= 400


def test_an_error_without_an_entry_of_its_own_takes_its_nearest_ancestors() -> None:
    class Narrower(AdapterNotFound):
        pass

    assert kind_of(Narrower("x")) is ERROR_KINDS[AdapterNotFound]


def test_a_full_queue_says_when_to_come_back_in_both_forms() -> None:
    response = server_error_response(QueueFull("full", retry_after_s=1.5))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.headers["retry-after-ms"] == "1500"
    assert "x-should-retry" not in response.headers


def test_a_conflict_tells_the_sdk_not_to_retry_and_a_dead_engine_does_not() -> None:
    assert server_error_response(AdapterMismatch("other base")).headers["x-should-retry"] == "false"
    assert "x-should-retry" not in server_error_response(EngineDied("gone")).headers


def test_a_missing_key_is_challenged() -> None:
    response = error_response(401, "authentication_error", "invalid_api_key", "no key")
    assert response.headers["www-authenticate"] == "Bearer"


async def test_an_error_of_another_room_reaches_the_client_through_its_tree() -> None:
    async with client_of(app_raising(NotFound("there is no adapter 'x'"))) as client:
        response = await client.get("/raise")
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "there is no adapter 'x'",
        "type": "not_found_error",
        "param": None,
        "code": "model_not_found",
    }


async def test_an_unknown_error_tells_nothing_of_its_inside() -> None:
    async with client_of(app_raising(RuntimeError("password=hunter2 at /srv/secret"))) as client:
        response = await client.get("/raise")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "hunter2" not in response.text
    assert "/srv" not in response.text


async def test_an_unknown_path_and_a_wrong_method_have_openais_form() -> None:
    async with client_of(app_raising(RuntimeError())) as client:
        missing = await client.get("/nowhere")
        wrong = await client.delete("/items")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert "/nowhere" in missing.json()["error"]["message"]
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_a_rate_limit_raised_as_a_plain_http_error_gets_its_headers() -> None:
    async with client_of(app_raising(HTTPException(429, "slow down"))) as client:
        response = await client.get("/raise")
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert response.headers["retry-after-ms"] == "1000"


async def test_a_thousand_wrong_values_make_a_short_answer() -> None:
    async with client_of(app_raising(RuntimeError())) as client:
        response = await client.post("/items", json={"sizes": ["x" * 4000] * 1000, "name": "y" * 100_000})
    assert response.status_code == 400
    assert len(response.content) < 8192
    error = response.json()["error"]
    assert error["param"] == "sizes.0"
    assert error["code"] == "invalid_value"
    assert error["message"].endswith("and 991 more")
    assert "x" * 201 not in error["message"]


async def test_a_missing_field_and_a_torn_body_are_named() -> None:
    async with client_of(app_raising(RuntimeError())) as client:
        missing = await client.post("/items", json={"sizes": []})
        torn = await client.post(
            "/items", content=b'{"sizes": [', headers={"content-type": "application/json"}
        )
    assert missing.json()["error"]["message"] == "name: this field is required"
    assert missing.json()["error"]["param"] == "name"
    assert torn.status_code == 400
    assert "not valid JSON" in torn.json()["error"]["message"]
