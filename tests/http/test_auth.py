"""Who may reach a route: keys, hosts and origins, on every route that there is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from starlette.routing import BaseRoute

KEY = "timbre_0123456789"
PUBLIC = {"/health", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"}
CRAFTED_HOSTS = [
    "timbre", "localhost", "127.0.0.1:8000", "[::1]", "health", "/health", "timbre/health", "timbre?/livez",
    "timbre#", "timbre@health", "a:b@timbre", "timbre:80/health?", "x\\livez", "livez", "//livez", "..", "*",
    "", " ", "timbre livez", "timbre%2Flivez", "xn--a", "0", "timbre.", ".", "@", "?", "#", "https://timbre/livez",
]  # fmt: skip


def routes_of(served: Any) -> list[tuple[str, str]]:
    """(method, concrete path) of every route of the application."""

    def walk(routes: list[BaseRoute]) -> list[tuple[str, str]]:
        found = []
        for route in routes:
            if methods := getattr(route, "methods", None):
                path = route.path.replace("{reference}", "pirate").replace("{digest}", "sha256:" + "0" * 64)
                found += [(method, path) for method in sorted(methods)]
            if included := getattr(route, "original_router", None):
                found += walk(included.routes)
        return found

    return walk(list(served.app.router.routes))


async def test_every_route_but_the_public_probes_needs_a_key(serve: Callable[..., Any]) -> None:
    served = serve(api_keys=(KEY,), serve_openapi=True)
    routes = routes_of(served)
    assert {"/v1/adapters", "/v1/load_lora_adapter", "/metrics", "/openapi.json"} <= {
        path for _, path in routes
    }
    open_paths = set()
    for method, path in routes:
        response = await served.client.request(method, path)
        if response.status_code != 401:
            open_paths.add(path)
    assert open_paths == PUBLIC


async def test_a_path_that_leads_nowhere_needs_a_key_too(serve: Callable[..., Any]) -> None:
    served = serve(api_keys=(KEY,))
    for path in (
        "/",
        "/nothing",
        "/v1",
        "/docs",
        "/redoc",
        "//health",
        "/health/",
        "/livez/../v1/adapters",
        "/HEALTH",
    ):
        assert (await served.client.get(path)).status_code == 401, path


async def test_a_refusal_says_how_to_give_a_key(serve: Callable[..., Any]) -> None:
    response = await serve(api_keys=(KEY,)).client.get("/v1/adapters")
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_any_of_the_keys_opens(serve: Callable[..., Any], scheme: str) -> None:
    served = serve(api_keys=("another-key", KEY))
    for key in ("another-key", KEY):
        response = await served.client.get("/v1/adapters", headers={"Authorization": f"{scheme} {key}"})
        assert response.status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        KEY,
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Bearer{KEY}",
        "Bearer \xff",
    ],
)
async def test_anything_else_does_not_open(serve: Callable[..., Any], value: str) -> None:
    headers = [("Authorization", value.encode("latin-1"))]
    assert (await serve(api_keys=(KEY,)).client.get("/v1/adapters", headers=headers)).status_code == 401


async def test_two_authorization_headers_are_not_one(serve: Callable[..., Any]) -> None:
    headers = [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer no")]
    assert (await serve(api_keys=(KEY,)).client.get("/v1/adapters", headers=headers)).status_code == 401


async def test_no_crafted_host_reaches_a_guarded_route(serve: Callable[..., Any]) -> None:
    served = serve(api_keys=(KEY,))
    guarded = [(method, path) for method, path in routes_of(served) if path not in PUBLIC]
    for host in CRAFTED_HOSTS:
        for method, path in guarded:
            response = await served.client.request(method, path, headers={"Host": host})
            assert response.status_code in (401, 403), (host, method, path)
    assert (served.engine.loaded, served.engine.unloaded, served.uploads) == ([], [], [])


async def test_metrics_are_public_only_by_the_setting(serve: Callable[..., Any]) -> None:
    served = serve(api_keys=(KEY,), public_metrics=True)
    assert (await served.client.get("/metrics")).status_code == 200
    assert (await served.client.get("/v1/adapters")).status_code == 401


async def test_without_keys_everything_is_open(serve: Callable[..., Any]) -> None:
    assert (await serve().client.get("/v1/adapters")).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("LOCALHOST", 200), ("[::1]:8000", 200), ("a.example.org", 200),
     ("example.org", 403), ("evil.test", 403), ("localhost.evil.test", 403), ("evillocalhost", 403),
     ("", 403)],
)  # fmt: skip
async def test_only_the_allowed_hosts_are_answered(serve: Callable[..., Any], host: str, status: int) -> None:
    served = serve(allowed_hosts=("localhost", "[::1]", "*.example.org"))
    assert (await served.client.get("/v1/adapters", headers={"Host": host})).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://timbre", 200),
        ("https://timbre", 200),
        ("http://evil.test", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
async def test_a_foreign_page_is_refused_where_no_key_protects(
    serve: Callable[..., Any], origin: str, status: int
) -> None:
    headers = {"Origin": origin}
    assert (await serve().client.get("/v1/adapters", headers=headers)).status_code == status


async def test_a_foreign_page_with_a_key_is_answered(serve: Callable[..., Any]) -> None:
    headers = {"Origin": "http://app.test", "Authorization": f"Bearer {KEY}"}
    assert (await serve(api_keys=(KEY,)).client.get("/v1/adapters", headers=headers)).status_code == 200
