"""A multipart form with an adapter's two files, streamed into the store without ever lying in memory.

Part names are constants; file names and content types that a client sends are never looked at. Parts are
parsed and written by a worker thread, a piece at a time, so an upload does not hold up the event loop.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from timbre_server.errors import InvalidRequest
from timbre_store.errors import BlobTooLarge
from timbre_store.writer import BlobWriter

CONFIG_PART = "adapter_config.json"
TENSORS_PART = "adapter_model.safetensors"
TEXT_PARTS = ("name", "base_model")
MAX_TEXT_BYTES = 512
PIECE_BYTES = 1 << 20
FORM_OVERHEAD_BYTES = 1 << 16


class OpensBlobs(Protocol):
    """Where files go: a writer whose blob is the caller's to keep or to give up."""

    def begin_blob(self, max_bytes: int) -> BlobWriter: ...


@dataclass(slots=True)
class AdapterForm:
    """What a complete form held."""

    texts: dict[str, str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Digest by part name; both files are there."""


async def read_adapter_form(
    content_type: str,
    stream: AsyncIterator[bytes],
    store: OpensBlobs,
    *,
    max_bytes_by_file: dict[str, int],
) -> AdapterForm:
    """Reads the whole form; the blobs are the upload's, and no temporary file outlives this call.

    Raises: InvalidRequest for a form that is malformed, lacks a part or has one twice or too many;
    BlobTooLarge, StoreFull.
    """
    with ExitStack() as open_files:
        parser = _FormParser(_boundary(content_type), store, open_files, max_bytes_by_file)
        pieces = bytearray()
        async for chunk in stream:
            pieces += chunk
            if len(pieces) >= PIECE_BYTES:
                await run_in_threadpool(parser.feed, bytes(pieces))
                pieces.clear()
        return await run_in_threadpool(parser.finish, bytes(pieces))


def _boundary(content_type: str) -> bytes:
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise InvalidRequest(
            "The form has no boundary; expected Content-Type: multipart/form-data; boundary=…"
        )
    return boundary


class _FormParser:
    """Turns the parser's callbacks into texts and blobs. One thread at a time."""

    def __init__(
        self, boundary: bytes, store: OpensBlobs, open_files: ExitStack, max_bytes_by_file: dict[str, int]
    ) -> None:
        self._store = store
        self._open_files = open_files
        self._max_bytes_by_file = max_bytes_by_file
        self._texts: dict[str, bytearray] = {}
        self._writers: dict[str, BlobWriter] = {}
        self._header = (bytearray(), bytearray())
        self._name: str | None = None
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    def feed(self, piece: bytes) -> None:
        try:
            self._parser.write(piece)
        except MultipartParseError as error:
            raise InvalidRequest(f"The form is malformed: {error}") from error

    def finish(self, piece: bytes) -> AdapterForm:
        self.feed(piece)
        if not self._ended:
            raise InvalidRequest("The form ends before its closing boundary; the upload was cut short.")
        missing = [name for name in ("name", CONFIG_PART, TENSORS_PART) if name not in self._seen()]
        if missing:
            raise InvalidRequest(
                f"The form has no part {missing[0]!r}; expected {self._expected()}", param=missing[0]
            )
        form = AdapterForm(texts={name: _decoded(name, text) for name, text in self._texts.items()})
        for name, writer in self._writers.items():
            form.digests[name] = writer.commit()
        return form

    def _seen(self) -> set[str]:
        return self._texts.keys() | self._writers.keys()

    def _expected(self) -> str:
        return f"the parts name, {CONFIG_PART} and {TENSORS_PART}, and at most base_model besides."

    def _on_part_begin(self) -> None:
        self._name = None

    def _on_header_end(self) -> None:
        field_name, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if field_name.lower() == b"content-disposition":
            _, options = parse_options_header(value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")

    def _on_headers_finished(self) -> None:
        name = self._name
        if name in self._seen():
            raise InvalidRequest(f"The form has the part {name!r} twice.", param=name)
        if name in self._max_bytes_by_file:
            writer = self._store.begin_blob(self._max_bytes_by_file[name])
            self._writers[name] = self._open_files.enter_context(writer)
        elif name in TEXT_PARTS:
            self._texts[name] = bytearray()
        else:
            found = "a part without a name" if name is None else f"a part named {name[:80]!r}"
            raise InvalidRequest(f"The form has {found}; expected {self._expected()}")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        name = self._name or ""
        if name in self._writers:
            self._writers[name].write(memoryview(data)[start:end])
            return
        self._texts[name] += data[start:end]
        if len(self._texts[name]) > MAX_TEXT_BYTES:
            raise BlobTooLarge(f"the form's field {name!r} has more than {MAX_TEXT_BYTES} bytes")

    def _on_end(self) -> None:
        self._ended = True


def _decoded(name: str, text: bytearray) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The form's field {name!r} is not UTF-8.", param=name) from error
