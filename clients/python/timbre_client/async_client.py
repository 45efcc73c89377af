"""The client for code that awaits; `client` says what each method does. Needs asyncio for uploads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2

from timbre_client import api
from timbre_client.answers import ChatAnswer, ChatDelta, Completion, TextDelta
from timbre_client.calls import END_MARK, Call, cut_off, pieces
from timbre_client.connection import DEFAULT_URL, connecting, headers_with, streaming, timeouts_of
from timbre_client.records import Adapter, AdapterPage, Collection, MadeAdapter, ModelPage
from timbre_client.upload import OnProgress, Upload, digest_of, upload, upload_file

Answer = TypeVar("Answer")


class AsyncTimbre:
    """As `Timbre`. Close a stream that is left early with `contextlib.aclosing`, or it runs on."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx2.AsyncClient(
            base_url=base_url,
            headers=headers_with(api_key),
            timeout=timeouts_of(timeout_s),
            transport=transport,
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def complete(
        self, model: str | None, prompt: api.Prompt, **options: Unpack[api.Options]
    ) -> Completion:
        return await self._send(api.complete(model, prompt, options))

    async def chat(
        self, model: str | None, messages: Sequence[api.ChatMessage], **options: Unpack[api.Options]
    ) -> ChatAnswer:
        return await self._send(api.chat(model, messages, options))

    def stream_completion(
        self, model: str | None, prompt: api.Prompt, **options: Unpack[api.Options]
    ) -> AsyncGenerator[TextDelta, None]:
        return self._stream(api.streamed(api.complete(model, prompt, options)), TextDelta.of)

    def stream_chat(
        self, model: str | None, messages: Sequence[api.ChatMessage], **options: Unpack[api.Options]
    ) -> AsyncGenerator[ChatDelta, None]:
        """As `stream_completion`."""
        return self._stream(api.streamed(api.chat(model, messages, options)), ChatDelta.of)

    async def list_models(self, *, limit: int | None = None, after: str | None = None) -> ModelPage:
        return await self._send(api.list_models(limit, after))

    async def list_adapters(self, *, limit: int | None = None, after: str | None = None) -> AdapterPage:
        return await self._send(api.list_adapters(limit, after))

    async def get_adapter(self, reference: str) -> Adapter:
        return await self._send(api.get_adapter(reference))

    async def upload_adapter(
        self,
        name: str,
        folder: Path,
        *,
        on_progress: OnProgress | None = None,
        by_digest: bool | None = None,
    ) -> Adapter:
        return await self._follow(upload(name, folder, on_progress=on_progress, by_digest=by_digest))

    async def upload_file(self, path: Path, *, on_progress: OnProgress | None = None) -> str:
        return await self._follow(upload_file(path, on_progress=on_progress))

    async def delete_adapter(self, reference: str, *, wait: bool = False) -> None:
        await self._send(api.delete_adapter(reference, wait))

    async def set_alias(self, alias: str, target: str) -> Adapter:
        return await self._send(api.set_alias(alias, target))

    async def pin_adapter(self, reference: str) -> Adapter:
        return await self._send(api.pin_adapter(reference))

    async def unpin_adapter(self, reference: str) -> Adapter:
        return await self._send(api.unpin_adapter(reference))

    async def create_recipe(
        self,
        name: str,
        kind: api.RecipeKind,
        parents: Mapping[str, float],
        **numbers: Unpack[api.RecipeNumbers],
    ) -> MadeAdapter:
        return await self._send(api.create_recipe(name, kind, parents, numbers))

    async def compress_adapters(
        self, members: Mapping[str, str], *, rank: int, kind: api.CollectionKind = "joint_full"
    ) -> Collection:
        return await self._send(api.compress(members, rank, kind))

    async def is_ready(self) -> bool:
        return await self._send(api.is_ready())

    async def _follow(self, flow: Upload[Answer]) -> Answer:
        answer: Any = None
        while True:
            try:
                wanted = flow.send(answer)
            except StopIteration as end:
                result: Answer = end.value
                return result
            if isinstance(wanted, Path):
                answer = await asyncio.to_thread(digest_of, wanted)
            else:
                answer = await self._send(wanted)

    async def _send(self, call: Call[Answer]) -> Answer:
        with connecting(self._http.base_url):
            response = await self._http.send(call.request(self._http))
        return call.answer(response)

    async def _stream(
        self, call: Call[None], read: Callable[[Any], tuple[Answer, ...]]
    ) -> AsyncGenerator[Answer, None]:
        with connecting(self._http.base_url):
            response = await self._http.send(call.request(self._http), stream=True)
        try:
            with streaming():
                if not response.is_success:
                    await response.aread()
                    call.answer(response)
                async for event in httpx2.EventSource(response):
                    if event.data == END_MARK:
                        return
                    for piece in pieces(event, read):
                        yield piece
            raise cut_off()
        finally:
            await response.aclose()
