"""Sending an adapter's two files: as one form, or each under its digest and only if the server lacks it.

An upload is written once, as a generator: it yields a call and is sent the answer, or a file's path and is
sent the digest. Each client does both in its own way. Files are read in pieces and never held whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from timbre_client.calls import Call
from timbre_client.records import Adapter

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PIECE_BYTES = 1 << 18
FORM_LIMIT_BYTES = 8 << 20
"""Larger adapters go by digest, so that a second try need not send what has arrived."""

Result = TypeVar("Result")
Upload = Generator[Call[Any] | Path, Any, Result]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an upload is."""

    sent_bytes: int
    total_bytes: int


OnProgress = Callable[[Progress], None]


class _Meter:
    """Adds up what was sent, and tells."""

    def __init__(self, total_bytes: int, tell: OnProgress | None) -> None:
        self._total_bytes = total_bytes
        self._tell = tell
        self.sent_bytes = 0

    def add(self, count: int) -> None:
        self.sent_bytes += count
        if self._tell is not None and count:
            self._tell(Progress(self.sent_bytes, self._total_bytes))


class _Pieces:
    """A body of texts and files, one after another, for either client."""

    def __init__(self, parts: tuple[bytes | Path, ...], meter: _Meter) -> None:
        self._parts = parts
        self._meter = meter

    @property
    def size_bytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.stat().st_size for part in self._parts)

    def __iter__(self) -> Iterator[bytes]:
        for piece, of_file in self._read():
            yield piece
            self._meter.add(len(piece) if of_file else 0)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """As `__iter__`; files are read by a worker thread, progress is told on the loop's."""
        pieces = self._read()
        while (read := await asyncio.to_thread(next, pieces, None)) is not None:
            piece, of_file = read
            yield piece
            self._meter.add(len(piece) if of_file else 0)

    def _read(self) -> Iterator[tuple[bytes, bool]]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part, False
                continue
            with part.open("rb") as file:
                while piece := file.read(PIECE_BYTES):
                    yield piece, True


def digest_of(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def upload(
    name: str, folder: Path, *, on_progress: OnProgress | None, by_digest: bool | None
) -> Upload[Adapter]:
    """The calls that send an adapter. ``by_digest`` None: as its size asks.

    Raises: FileNotFoundError where one of the two files is missing.
    """
    files = {CONFIG_FILE: folder / CONFIG_FILE, TENSORS_FILE: folder / TENSORS_FILE}
    total_bytes = sum(path.stat().st_size for path in files.values())
    meter = _Meter(total_bytes, on_progress)
    if by_digest if by_digest is not None else total_bytes > FORM_LIMIT_BYTES:
        return (yield from _send_by_digest(name, files, meter))
    adapter: Adapter = yield _form(name, files, meter)
    return adapter


def upload_file(path: Path, *, on_progress: OnProgress | None) -> Upload[str]:
    """The calls that send one file under its digest, which is the result. Raises: FileNotFoundError."""
    return (yield from _send_file(path, _Meter(path.stat().st_size, on_progress)))


def _send_by_digest(name: str, files: dict[str, Path], meter: _Meter) -> Upload[Adapter]:
    digests = {}
    for part, path in files.items():
        digests[part] = yield from _send_file(path, meter)
    adapter: Adapter = yield Call("POST", "/v1/adapters", Adapter.of, json={"name": name, "files": digests})
    return adapter


def _send_file(path: Path, meter: _Meter) -> Upload[str]:
    digest: str = yield path
    blob = f"/v1/blobs/{digest}"
    if (yield Call("HEAD", blob, bool, expected={200: True, 404: False})):
        meter.add(path.stat().st_size)
    else:
        yield _sized("PUT", blob, (path,), "application/octet-stream", meter)
    return digest


def _form(name: str, files: dict[str, Path], meter: _Meter) -> Call[Adapter]:
    boundary = secrets.token_hex(16)
    parts: list[bytes | Path] = [_part_head(boundary, "name"), name.encode()]
    for part, path in files.items():
        parts += [b"\r\n", _part_head(boundary, part, filename=True), path]
    body = (*parts, f"\r\n--{boundary}--\r\n".encode())
    return _sized("POST", "/v1/adapters", body, f"multipart/form-data; boundary={boundary}", meter)


def _part_head(boundary: str, part: str, *, filename: bool = False) -> bytes:
    named = f'; filename="{part}"' if filename else ""
    return f'--{boundary}\r\nContent-Disposition: form-data; name="{part}"{named}\r\n\r\n'.encode()


def _sized(method: str, path: str, parts: tuple[bytes | Path, ...], kind: str, meter: _Meter) -> Call[Any]:
    body = _Pieces(parts, meter)
    headers = {"content-type": kind, "content-length": str(body.size_bytes)}
    read = Adapter.of if method == "POST" else bool
    return Call(method, path, read, body=body, headers=headers)
