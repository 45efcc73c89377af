"""A server for the client to talk to: the real adapter routes on a real store, and canned completions.

It runs in a thread behind the server's own uvicorn, because what a client does on a socket is the point.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from safetensors.numpy import save_file
from starlette.responses import JSONResponse, Response, StreamingResponse

from timbre_client import Timbre
from timbre_methods.prompt_contract import NO_FRAME
from timbre_server.engine.messages import SiteShape, StepStats
from timbre_server.engine.pin_messages import PinnedAdapter
from timbre_server.errors import ContextLengthExceeded, QueueFull
from timbre_server.http.adapters import AdapterRoom, Retirement, adapter_router
from timbre_server.http.blobs import blob_router
from timbre_server.http.compression import compression_router
from timbre_server.http.errors import install_error_handlers
from timbre_server.http.pins import PinRoom, pin_router
from timbre_server.http.recipes import RecipeRoom, recipe_router
from timbre_server.http.server import HttpServer, ServerOptions
from timbre_server.inspection import meta_sites
from timbre_server.merging import Merges
from timbre_store.inspection import Inspection
from timbre_store.limits import StoreLimits
from timbre_store.store import Store

BASE_DIGEST = "sha256:" + "0" * 64
STAMP = {"name": "pirate", "version": 2, "digest": "sha256:" + "1" * 64}
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 2,
    "total_tokens": 5,
    "prompt_tokens_details": {"cached_tokens": 1},
}


def inspect(config: dict[str, Any], header: object, tensors: Path, derived: Path) -> Inspection:
    if config.get("peft_type") not in ("LORA", "LORA_XS", "ARROW", "LORA_MIXER"):
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; expected LORA")
    return Inspection(config["peft_type"].lower(), ("model.layers.0.q_proj",), 6, 24)


def text_event(**fields: Any) -> bytes:
    body = {"id": "cmpl-1", "model": "pirate", "choices": [], "usage": None, "adapter": STAMP, **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def chat_event(delta: dict[str, str], finish_reason: str | None) -> bytes:
    return text_event(choices=[{"index": 0, "delta": delta, "finish_reason": finish_reason}])


async def completion_events(prompt: str) -> AsyncIterator[bytes]:
    yield b": keep-alive\n\n"
    yield text_event(choices=[{"index": 0, "text": "Ahoy", "finish_reason": None}])
    if prompt == "break":
        return
    if prompt == "fail":
        yield b'data: {"error": {"message": "the engine died", "code": "engine_died"}}\n\n'
    yield text_event(choices=[{"index": 0, "text": " \N{PARTY POPPER}", "finish_reason": "stop"}])
    yield text_event(usage=USAGE)
    yield b"data: [DONE]\n\n"


async def chat_events() -> AsyncIterator[bytes]:
    yield chat_event({"role": "assistant"}, None)
    yield chat_event({"content": "Arr"}, None)
    yield chat_event({}, "stop")
    yield b"data: [DONE]\n\n"


def add_completions(app: FastAPI, seen: list[dict[str, Any]]) -> None:
    @app.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        body = await request.json()
        seen.append({"authorization": request.headers.get("authorization"), **body})
        if body["prompt"] == "too long":
            raise ContextLengthExceeded("9 tokens; the model reads 8")
        if body["prompt"] == "full":
            raise QueueFull("1024 requests are in the server")
        if body["prompt"] == "nonsense":
            return Response("<html>", media_type="text/html")
        if body.get("stream"):
            return StreamingResponse(completion_events(body["prompt"]), media_type="text/event-stream")
        choice = {"index": 0, "text": "Ahoy", "finish_reason": "length", "logprobs": None}
        adapter = {"mix": [{**STAMP, **each} for each in body["adapters"]]} if "adapters" in body else STAMP
        return JSONResponse(
            {"id": "cmpl-1", "model": body["model"], "choices": [choice], "usage": USAGE, "adapter": adapter}
        )

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> Response:
        body = await request.json()
        seen.append(body)
        if body.get("stream"):
            return StreamingResponse(chat_events(), media_type="text/event-stream")
        choice = {"index": 0, "message": {"role": "assistant", "content": "Arr"}, "finish_reason": "stop"}
        return JSONResponse({"id": "chatcmpl-1", "model": body["model"], "choices": [choice], "usage": USAGE})


class PinningEngine:
    """Of an engine, what pins need."""

    def __init__(self) -> None:
        self.info = SimpleNamespace(model_digest=BASE_DIGEST, adapter_budget_bytes=1 << 30)
        self.latest = StepStats()

    async def pin_adapter(self, digest: str, mix: object) -> PinnedAdapter:
        pinned = PinnedAdapter(digest, 14, 5000)
        self.latest = StepStats(pinned=pinned)
        return pinned

    async def unpin_adapter(self, digest: str) -> None:
        self.latest = StepStats()


def make_app(store: Store, seen: list[dict[str, Any]]) -> FastAPI:
    async def unload(digest: str) -> None:
        seen.append({"unloaded": digest})

    app = FastAPI()
    install_error_handlers(app)
    engine = PinningEngine()
    room = AdapterRoom(
        store, ("base",), BASE_DIGEST, 1 << 30, Retirement(unload), lambda stored: None,
        lambda: engine.latest.pinned,
    )  # fmt: skip
    app.include_router(adapter_router(room))
    app.include_router(pin_router(PinRoom(engine, store.resolve, lambda digest: None, is_allowed=True)))
    merges = Merges(store.root, meta_sites([SiteShape("model.layers.0.q_proj", 8, 8, False)]), NO_FRAME)
    kitchen = RecipeRoom(
        store, ("base",), BASE_DIGEST, 1 << 30, merges.merge, merges.compress, lambda kind, made: None
    )
    app.include_router(recipe_router(kitchen))
    app.include_router(compression_router(kitchen))
    app.include_router(blob_router(store, max_upload_bytes=1 << 30))
    add_completions(app, seen)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        data = [
            {"id": "base", "parent": None, "root": "base"},
            {"id": "pirate", "parent": "base", "root": "x"},
        ]
        return {"object": "list", "data": data, "has_more": True}

    @app.middleware("http")
    async def count_blobs(request: Request, call_next: Any) -> Response:
        if request.method in {"PUT", "HEAD"}:
            seen.append({"method": request.method, "length": request.headers.get("content-length")})
        response: Response = await call_next(request)
        return response

    return app


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    server = HttpServer(app, ServerOptions(port=0))
    thread = threading.Thread(target=lambda: asyncio.run(server.run()))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.stop()
        thread.join(timeout=30)


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    """What the server was asked, in order."""
    return []


@pytest.fixture
def url(tmp_path: Path, seen: list[dict[str, Any]]) -> Iterator[str]:
    with (
        Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as store,
        served(make_app(store, seen)) as address,
    ):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Timbre]:
    with Timbre(url) as open_client:
        yield open_client


@pytest.fixture
def adapter_folder(tmp_path: Path) -> Path:
    """A LoRA adapter of 1.5 MB, as PEFT writes one."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    save_file(
        {"q_proj.lora_A.weight": np.ones((2, 196_608), np.float32)}, folder / "adapter_model.safetensors"
    )
    return folder
