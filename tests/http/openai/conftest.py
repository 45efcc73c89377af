"""A scripted engine behind the real OpenAI routes, over a real byte-level tokenizer built here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import orjson
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from timbre_server.errors import QueueFull
from timbre_server.http.chat import chat_router
from timbre_server.http.completions import completions_router
from timbre_server.http.context import ServingContext, ServingLimits
from timbre_server.http.errors import ErrorBoundary, install_error_handlers
from timbre_server.http.models import models_router
from timbre_server.http.text import TextCodec
from timbre_server.request_record import RequestRecord
from timbre_store.errors import NotFound
from timbre_store.manifest import Manifest
from timbre_store.names import Reference
from timbre_store.records import AdapterRecord, Named, Page

BASE = "tiny-base"
BASE_DIGEST = "sha256:" + "b" * 64
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] or '!!' in m.content %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if shout is defined and shout %}LOUD {% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def codec_of(tokenizer: Tokenizer, template: str | None = TEMPLATE) -> TextCodec:
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template))


class Gate:
    """Admission that counts, and can be closed."""

    def __init__(self) -> None:
        self.held: list[tuple[int, int]] = []
        self.is_full = False

    @contextmanager
    def hold(self, num_requests: int, num_tokens: int) -> Iterator[None]:
        if self.is_full:
            raise QueueFull("the server is full", retry_after_s=2.0)
        entry = (num_requests, num_tokens)
        self.held.append(entry)
        try:
            yield
        finally:
            self.held.remove(entry)


class Shelf:
    """Adapters by name and version, with the store's answers."""

    def __init__(self) -> None:
        self.records: list[AdapterRecord] = []
        self.aliases: dict[str, str] = {}

    def add(self, name: str, version: int = 1, base: str | None = BASE_DIGEST) -> AdapterRecord:
        digest = "sha256:" + f"{len(self.records):064x}"
        manifest = Manifest("lora", "LORA", base, ("q",), 1, 1, 1, digest, digest)
        record = AdapterRecord(name, version, digest, 1_700_000_000.5, manifest)
        self.records.append(record)
        return record

    def resolve(self, reference: str) -> AdapterRecord:
        wanted = Reference.parse(self.aliases.get(reference, reference))
        for record in reversed(self.records):
            same_pin = wanted.version in (None, record.version) and wanted.digest in (None, record.digest)
            if record.name == wanted.name and same_pin:
                return record
        raise NotFound(f"no adapter {reference!r}")

    def page(self, limit: int, after: str | None) -> Page[Named]:
        every = {record.name for record in self.records} | self.aliases.keys()
        names = [name for name in sorted(every) if after is None or name > after]
        items = tuple(Named(name, self.resolve(name)) for name in names[:limit])
        return Page(items, items[-1].name if len(names) > limit else None)


@dataclass
class Rig:
    """The routes, what is behind them, and a client in front."""

    engine: Any
    context: ServingContext
    gate: Gate
    shelf: Shelf
    records: list[RequestRecord] = field(default_factory=list)

    @property
    def app(self) -> FastAPI:
        app = FastAPI()
        install_error_handlers(app)
        app.add_middleware(ErrorBoundary)
        for make in (completions_router, chat_router, models_router):
            app.include_router(make(self.context))
        return app

    def client(self) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(transport=httpx2.ASGITransport(self.app), base_url="http://timbre")

    async def post(self, path: str, **body: Any) -> httpx2.Response:
        async with self.client() as client:
            return await client.post(path, json=body)

    async def get(self, path: str) -> httpx2.Response:
        async with self.client() as client:
            return await client.get(path)

    async def complete(self, **body: Any) -> dict[str, Any]:
        response = await self.post("/v1/completions", **{"model": BASE, "prompt": "hi", **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def chat(self, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": "hi"}]
        response = await self.post("/v1/chat/completions", **{"model": BASE, "messages": messages, **body})
        assert response.status_code == 200, response.text
        return dict(response.json())

    async def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which must be well formed and end in ``[DONE]``."""
        default: dict[str, Any] = {"prompt": "hi"}
        if "chat" in path:
            default = {"messages": [{"role": "user", "content": "hi"}]}
        response = await self.post(path, **{"model": BASE, "stream": True, **default, **body})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        blocks = response.text.split("\n\n")
        assert blocks.pop() == ""
        assert blocks.pop() == "data: [DONE]"
        assert all(block.startswith("data: ") for block in blocks)
        return [orjson.loads(block.removeprefix("data: ")) for block in blocks]

    async def refused(self, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that must be refused."""
        default: dict[str, Any] = {"prompt": "hi"}
        if "chat" in path:
            default = {"messages": [{"role": "user", "content": "hi"}]}
        response = await self.post(path, **{"model": BASE, **default, **body})
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error

    def with_limits(self, **limits: Any) -> Rig:
        self.context = replace(self.context, limits=replace(self.context.limits, **limits))
        return self


def new_rig(engine: Any, *, with_text: bool = True) -> Rig:
    gate, shelf = Gate(), Shelf()
    records: list[RequestRecord] = []
    context = ServingContext(
        engine=engine,
        text=engine.codec if with_text else None,
        resolve=shelf.resolve,
        list_names=shelf.page,
        base_names=(BASE, "org/" + BASE),
        admission=gate,
        started_s=1_700_000_000,
        on_submitted=lambda request_id: None,
        on_finished=records.append,
        limits=ServingLimits(),
    )
    return Rig(engine, context, gate, shelf, records)


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    """What was logged."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="session")
def scripted_engine(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    return load_module(Path(__file__).with_name("scripted_engine.py"))


@pytest.fixture(scope="session")
def codec(tokenizer: Tokenizer) -> Iterator[TextCodec]:
    made = codec_of(tokenizer)
    yield made
    made.close()


@pytest.fixture(scope="session")
def make_codec() -> Callable[[Tokenizer, str | None], TextCodec]:
    return codec_of


@pytest.fixture(scope="session")
def tokenizer(scripted_engine: ModuleType) -> Tokenizer:
    made: Tokenizer = scripted_engine.byte_level_tokenizer()
    return made


@pytest.fixture(scope="session")
def make_engine(scripted_engine: ModuleType, codec: TextCodec) -> Callable[[], Any]:
    return lambda: scripted_engine.ScriptedEngine(codec, BASE, BASE_DIGEST)


@pytest.fixture(scope="session")
def make_rig(make_engine: Callable[[], Any]) -> Callable[[], Rig]:
    """For property tests, which need a new one for each example."""
    return lambda: new_rig(make_engine())


@pytest.fixture
def rig(make_engine: Callable[[], Any]) -> Rig:
    return new_rig(make_engine())


@pytest.fixture
def rig_without_text(make_engine: Callable[[], Any]) -> Rig:
    return new_rig(make_engine(), with_text=False)
