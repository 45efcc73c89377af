"""A scripted engine behind the real OpenAI routes, over a real byte-level tokenizer built here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import orjson
import pytest
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from timbre_server.engine.messages import (
    AdapterLoaded,
    Ready,
    StepOutput,
    StepStats,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
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
from timbre_store.records import AdapterRecord, Page

BASE = "tiny-base"
BASE_DIGEST = "sha256:" + "b" * 64
MAX_MODEL_LEN = 512
EOS = "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] or '!!' in m.content %}"
    "{{ raise_exception('no such role') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if shout is defined and shout %}LOUD {% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("ð", "Ł"), ("ĺ", "Ģ"), ("Ã", "©"), ("Ġ", "ð"), ("o", "Ã")]
"""Some of them end inside a character: tokens must not be taken for text."""

Reply = Callable[[Submit], Sequence[int]]


def byte_level_tokenizer() -> Tokenizer:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken(EOS, special=True)])
    return tokenizer


def codec_of(tokenizer: Tokenizer, template: str | None = TEMPLATE) -> TextCodec:
    return TextCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template))


class ScriptedEngine:
    """Says what ``reply`` says, in events of the sizes of ``event_sizes``, then the end token."""

    def __init__(self, codec: TextCodec) -> None:
        eos = codec.encode(EOS, add_special_tokens=False)[0]
        self.info = Ready(
            model_name=BASE, model_digest=BASE_DIGEST, model_type="llama", dtype="float32", device="cpu",
            vocab_size=eos + 1, max_model_len=MAX_MODEL_LEN, eos_token_ids=(eos,), sites=(), block_size=16,
            num_kv_blocks=10, kv_cache_bytes=1, model_bytes=1, adapter_budget_bytes=1,
        )  # fmt: skip
        self.latest = StepStats()
        self.alive = True
        self.eos = eos
        self.codec = codec
        self.text = "hello wörld 😀!"
        self.reply: Reply = lambda _: codec.encode(self.text, add_special_tokens=False)
        self.event_sizes: Sequence[int] = (1,)
        self.gate: asyncio.Event | None = None
        """Waited for before each event after the first."""
        self.failure: TokenEvent | None = None
        """Takes the place of the last event."""
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []

    @property
    def has_work(self) -> bool:
        return False

    def seconds_since_last_step(self) -> float:
        return 0.0

    async def submit(self, request: Submit) -> AsyncIterator[TokenEvent]:
        self.submitted.append(request)
        ended = False
        try:
            for number, event in enumerate(self._events(request)):
                await asyncio.sleep(0)
                if number and self.gate is not None:
                    await self.gate.wait()
                yield event
            ended = True
        finally:
            if not ended:
                self.aborted.append(request.request_id)

    def _events(self, request: Submit) -> Iterator[TokenEvent]:
        sampling = request.sampling
        tokens = [*self.reply(request), self.eos][: sampling.max_tokens]
        ends = [index for index, token in enumerate(tokens) if token in sampling.stop_token_ids]
        if ends:
            tokens = tokens[: ends[0] + 1]
        reason = "stop" if ends else "length"
        first, start = True, 0
        sizes = list(self.event_sizes)
        while start < len(tokens) or first:
            size = sizes[0] if len(sizes) == 1 else sizes.pop(0)
            taken = tuple(tokens[start : start + size])
            start += max(size, 0)
            last = start >= len(tokens)
            if last and self.failure is not None:
                yield TokenEvent(
                    request.request_id,
                    finish_reason=self.failure.finish_reason,
                    error_code=self.failure.error_code,
                    error_message=self.failure.error_message,
                )
                return
            yield TokenEvent(
                request.request_id,
                token_ids=taken,
                logprobs=tuple(self._logprobs(t, sampling.logprobs) for t in taken)
                if sampling.logprobs is not None
                else (),
                prompt_logprobs=self._prompt_logprobs(request) if first else (),
                finish_reason=reason if last else None,  # type: ignore[arg-type]
                stop_token_id=taken[-1] if last and ends else None,
                cached_tokens=3 if first else 0,
            )
            first = False

    def _prompt_logprobs(self, request: Submit) -> tuple[TokenLogprobs | None, ...]:
        wanted = request.sampling.prompt_logprobs
        if wanted is None:
            return ()
        return (None, *(self._logprobs(token, wanted) for token in request.prompt_token_ids[1:]))

    def _logprobs(self, token: int, wanted: int) -> TokenLogprobs:
        count = self.info.vocab_size if wanted == -1 else wanted
        ranked = [token, *(other for other in range(self.info.vocab_size) if other != token)][:count]
        return TokenLogprobs(token, -0.5, 1, tuple((t, -0.5 - rank) for rank, t in enumerate(ranked)))

    async def load_adapter(self, digest: str) -> AdapterLoaded:
        return AdapterLoaded(digest)

    async def unload_adapter(self, digest: str) -> None:
        return None

    def on_output(self, callback: Callable[[StepOutput], None]) -> None:
        return None

    async def close(self) -> None:
        self.alive = False


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

    def add(self, name: str, version: int = 1, base: str | None = BASE_DIGEST) -> AdapterRecord:
        digest = "sha256:" + f"{len(self.records):064x}"
        manifest = Manifest("lora", "LORA", base, ("q",), 1, 1, 1, digest, digest)
        record = AdapterRecord(name, version, digest, 1_700_000_000.5, manifest)
        self.records.append(record)
        return record

    def resolve(self, reference: str) -> AdapterRecord:
        wanted = Reference.parse(reference)
        for record in reversed(self.records):
            same_pin = wanted.version in (None, record.version) and wanted.digest in (None, record.digest)
            if record.name == wanted.name and same_pin:
                return record
        raise NotFound(f"no adapter {reference!r}")

    def page(self, limit: int, after: str | None) -> Page[AdapterRecord]:
        latest = {record.name: record for record in self.records}
        names = [name for name in sorted(latest) if after is None or name > after]
        items = tuple(latest[name] for name in names[:limit])
        return Page(items, items[-1].name if len(names) > limit else None)


@dataclass
class Rig:
    """The routes, what is behind them, and a client in front."""

    engine: ScriptedEngine
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


def new_rig(codec: TextCodec, *, with_text: bool = True) -> Rig:
    engine, gate, shelf = ScriptedEngine(codec), Gate(), Shelf()
    records: list[RequestRecord] = []
    context = ServingContext(
        engine=engine,
        text=codec if with_text else None,
        resolve=shelf.resolve,
        list_adapters=shelf.page,
        base_names=(BASE, "org/" + BASE),
        admission=gate,
        started_s=1_700_000_000,
        on_finished=records.append,
        limits=ServingLimits(),
    )
    return Rig(engine, context, gate, shelf, records)


@pytest.fixture(scope="session")
def codec() -> Iterator[TextCodec]:
    made = codec_of(byte_level_tokenizer())
    yield made
    made.close()


@pytest.fixture(scope="session")
def make_codec() -> Callable[[Tokenizer, str | None], TextCodec]:
    return codec_of


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def make_rig(codec: TextCodec) -> Callable[[], Rig]:
    """For property tests, which need a new one for each example."""
    return lambda: new_rig(codec)


@pytest.fixture
def rig(codec: TextCodec) -> Rig:
    return new_rig(codec)


@pytest.fixture
def rig_without_text(codec: TextCodec) -> Rig:
    return new_rig(codec, with_text=False)
