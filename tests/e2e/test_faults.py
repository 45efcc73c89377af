"""What a real server does when clients leave, engines die and operators say stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

LONG = {"model": "tiny", "prompt": "Once", "max_tokens": 200, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def server(serve: Callable[..., Any], tiny_model: Path) -> Any:
    flags = ("--model", tiny_model, "--served-model-name", "tiny", "--dtype", "float32", "--kv-cache-mib", 8)
    return serve(*flags, "--drain-timeout-s", 20)


def gauge(server: Any, name: str) -> float:
    with server.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


def wait_for(condition: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, f"{what} did not happen"
        time.sleep(0.02)


def test_a_client_that_leaves_frees_its_place(server: Any) -> None:
    with server.client() as client:
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 4}) as answer:
                next(answer.iter_lines())
    wait_for(lambda: gauge(server, "vllm:num_requests_running") == 0, "the end of abandoned requests")
    assert gauge(server, "vllm:kv_cache_usage_perc") == 0
    with server.client() as client:
        assert client.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_a_dead_engine_ends_every_request_with_an_error_and_health_says_so(server: Any) -> None:
    lines: list[str] = []
    started = threading.Event()

    def stream() -> None:
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 8}) as answer,
        ):
            for line in answer.iter_lines():
                lines.append(line)
                started.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert started.wait(60)
    [engine] = server.engine_pids()
    os.kill(engine, signal.SIGKILL)
    thread.join(30)
    assert not thread.is_alive(), "the stream must end"
    assert any('"error"' in line for line in lines)
    assert server.process.wait(30) != 0, "without its engine a server ends, for a supervisor to start it anew"


def test_sigterm_lets_running_requests_finish_and_takes_no_new_ones(server: Any) -> None:
    lines: list[str] = []
    started = threading.Event()

    def stream() -> None:
        with (
            server.client() as client,
            client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer,
        ):
            for line in answer.iter_lines():
                lines.append(line)
                started.set()

    thread = threading.Thread(target=stream)
    thread.start()
    assert started.wait(60)
    server.process.send_signal(signal.SIGTERM)
    refused = _first_refusal(server)
    thread.join(60)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert not any('"error"' in line for line in lines)
    assert server.process.wait(30) == 0
    if refused is not None:
        assert refused.json()["error"]["code"] == "draining"
        assert "retry-after" in refused.headers


def _first_refusal(server: Any) -> httpx2.Response | None:
    """New work is refused once the drain has begun; a server that is gone already refuses it, too."""
    try:
        while True:
            answer = httpx2.post(f"{server.url}/v1/completions", json=LONG | {"max_tokens": 1}, timeout=30)
            if answer.status_code == 503:
                return answer
    except httpx2.TransportError:
        return None


def test_a_key_is_asked_for_everywhere_but_at_the_probes(serve: Callable[..., Any], tiny_model: Path) -> None:
    server = serve("--model", tiny_model, "--api-keys", "correct-horse", "--kv-cache-mib", 8)
    with server.client() as client:
        assert client.get("/readyz").status_code == 200
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer wrong-horse"}).status_code == 401
        answer = client.get("/v1/models", headers={"authorization": "Bearer correct-horse"})
        assert answer.status_code == 200
