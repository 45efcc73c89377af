"""The client for ordinary code. `async_client` is the same for code that awaits."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
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


class Timbre:
    """A connection pool to one server. Methods raise a `TimbreError`, nothing of the HTTP library's."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._http = httpx2.Client(
            base_url=base_url,
            headers=headers_with(api_key),
            timeout=timeouts_of(timeout_s),
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def complete(self, model: str | None, prompt: api.Prompt, **options: Unpack[api.Options]) -> Completion:
        """`model` is the base's name, or an adapter's: ``name``, ``name@3``, ``name@sha256:…``.

        ``mix={"pirate": 0.7, "json@2": 0.3}`` asks several adapters together: W + Σ weight · (W_adapter - W).
        """
        return self._send(api.complete(model, prompt, options))

    def chat(
        self, model: str | None, messages: Sequence[api.ChatMessage], **options: Unpack[api.Options]
    ) -> ChatAnswer:
        return self._send(api.chat(model, messages, options))

    def stream_completion(
        self, model: str | None, prompt: api.Prompt, **options: Unpack[api.Options]
    ) -> Generator[TextDelta, None, None]:
        """Pieces as they are made. The request goes out with the first; closing the stream ends it."""
        return self._stream(api.streamed(api.complete(model, prompt, options)), TextDelta.of)

    def stream_chat(
        self, model: str | None, messages: Sequence[api.ChatMessage], **options: Unpack[api.Options]
    ) -> Generator[ChatDelta, None, None]:
        """As `stream_completion`."""
        return self._stream(api.streamed(api.chat(model, messages, options)), ChatDelta.of)

    def list_models(self, *, limit: int | None = None, after: str | None = None) -> ModelPage:
        return self._send(api.list_models(limit, after))

    def list_adapters(self, *, limit: int | None = None, after: str | None = None) -> AdapterPage:
        """The latest version of each name, in order of names."""
        return self._send(api.list_adapters(limit, after))

    def get_adapter(self, reference: str) -> Adapter:
        """By name, name@version, name@sha256:… or alias."""
        return self._send(api.get_adapter(reference))

    def upload_adapter(
        self,
        name: str,
        folder: Path,
        *,
        on_progress: OnProgress | None = None,
        by_digest: bool | None = None,
    ) -> Adapter:
        """Sends ``adapter_config.json`` and ``adapter_model.safetensors``: a new version of `name`.

        Small adapters go as one form. Large ones, or any with `by_digest`, go file by file, and a file that
        the server has is not sent again.
        """
        return self._follow(upload(name, folder, on_progress=on_progress, by_digest=by_digest))

    def upload_file(self, path: Path, *, on_progress: OnProgress | None = None) -> str:
        """Sends one file, such as a router for `create_recipe`, unless the server has it; its digest.

        The file itself is removed after a day; what was made of it stays.
        """
        return self._follow(upload_file(path, on_progress=on_progress))

    def delete_adapter(self, reference: str, *, wait: bool = False) -> None:
        """Deletes an adapter, one version of it, or an alias. `wait`: until its memory is free as well."""
        self._send(api.delete_adapter(reference, wait))

    def set_alias(self, alias: str, target: str) -> Adapter:
        """Points an alias, new or old, at ``name`` (always its latest version) or ``name@version``."""
        return self._send(api.set_alias(alias, target))

    def pin_adapter(self, reference: str) -> Adapter:
        """Merges an adapter, or a named mix, that has most of the traffic; needs ``--allow-merged-pin``.

        Nobody's answers change. One is pinned at a time, until it is unpinned or deleted.
        """
        return self._send(api.pin_adapter(reference))

    def unpin_adapter(self, reference: str) -> Adapter:
        return self._send(api.unpin_adapter(reference))

    def create_recipe(
        self,
        name: str,
        kind: api.RecipeKind,
        parents: Mapping[str, float],
        **numbers: Unpack[api.RecipeNumbers],
    ) -> MadeAdapter:
        """Makes a new version of `name` of stored adapters, `parents` by name with their weights.

        Kind ``linear`` is a named mix of any families, W + Σ weight · (W_adapter − W); ``arrow`` and
        ``routed`` make a mixture of which each parent is an expert; the others make a LoRA.
        """
        return self._send(api.create_recipe(name, kind, parents, numbers))

    def compress_adapters(
        self, members: Mapping[str, str], *, rank: int, kind: api.CollectionKind = "joint_full"
    ) -> Collection:
        """Stores LoRAs anew in one basis that they share: `members` has each one's new name by its name.

        `rank` is that of the basis; of kind ``reversible`` the components for each rank of the LoRAs.
        """
        return self._send(api.compress(members, rank, kind))

    def is_ready(self) -> bool:
        """Whether the server takes work now."""
        return self._send(api.is_ready())

    def _follow(self, flow: Upload[Answer]) -> Answer:
        answer: Any = None
        while True:
            try:
                wanted = flow.send(answer)
            except StopIteration as end:
                result: Answer = end.value
                return result
            answer = digest_of(wanted) if isinstance(wanted, Path) else self._send(wanted)

    def _send(self, call: Call[Answer]) -> Answer:
        with connecting(self._http.base_url):
            response = self._http.send(call.request(self._http))
        return call.answer(response)

    def _stream(
        self, call: Call[None], read: Callable[[Any], tuple[Answer, ...]]
    ) -> Generator[Answer, None, None]:
        with connecting(self._http.base_url):
            response = self._http.send(call.request(self._http), stream=True)
        try:
            with streaming():
                if not response.is_success:
                    response.read()
                    call.answer(response)
                for event in httpx2.EventSource(response):
                    if event.data == END_MARK:
                        return
                    yield from pieces(event, read)
            raise cut_off()
        finally:
            response.close()
