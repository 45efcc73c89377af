"""Reads adapters by digest from a store's folder, without the catalogue and without a lock.

For the engine process, which holds digests only. It may run beside the process that writes: a file under
`blobs` or `manifests` is whole as soon as it has its name, and never changes. What it hands out was hashed
just now, save the tensors, which are large: hash them with `verify_blob` or `read_blob`, off the step loop.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timbre_store.digests import verify_bytes, verify_file
from timbre_store.errors import DigestMismatch, NotFound
from timbre_store.layout import Layout, content_path
from timbre_store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    manifest: Manifest
    config: dict[str, Any]
    tensors_path: Path
    """The safetensors file. Its size is right; its bytes are not yet verified."""
    derived_path: Path | None
    """Another one with what registration added, not yet verified either."""


def open_adapter(root: Path, digest: str) -> AdapterFiles:
    """Raises: NotFound if a file is missing; DigestMismatch if manifest or config are damaged."""
    layout = Layout(root)
    manifest = Manifest.from_bytes(_read_verified(layout.manifests, digest))
    config_content = _read_verified(layout.blobs, manifest.config_digest)
    tensors_path = content_path(layout.blobs, manifest.tensors_digest)
    if not tensors_path.exists():
        raise NotFound(f"the tensors of {digest} are not in the store; upload the adapter again")
    found_bytes = tensors_path.stat().st_size
    expected_bytes = manifest.stored_bytes - len(config_content)
    if found_bytes != expected_bytes:
        raise DigestMismatch(f"the tensors of {digest} have {found_bytes} bytes; expected {expected_bytes}")
    derived_path = None
    if manifest.derived_digest is not None:
        derived_path = content_path(layout.blobs, manifest.derived_digest)
        if not derived_path.exists():
            raise NotFound(f"the derived tensors of {digest} are not in the store; upload the adapter again")
    return AdapterFiles(manifest, json.loads(config_content), tensors_path, derived_path)


def require_blob(root: Path, digest: str) -> Path:
    """The file's path, not yet verified. Raises: NotFound."""
    path = content_path(Layout(root).blobs, digest)
    if not path.exists():
        raise NotFound(f"no blob {digest} is stored; upload it first")
    return path


def verify_blob(path: Path, digest: str) -> None:
    """Hash the whole file. Raises: DigestMismatch if it is not what the digest says."""
    verify_file(path, digest)


def read_blob(path: Path, digest: str, room: bytearray | None = None) -> memoryview:
    """The whole file, in memory of the caller's own: what is used is what was verified. Read into ``room``,
    or, where that is too small, into a new one.

    Raises: DigestMismatch.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if room is None or len(room) < size:
            room = bytearray(size)
        content = memoryview(room)[:size]
        num_read = 0
        while num_read < size and (count := file.readinto(content[num_read:])):
            num_read += count
    verify_bytes(content[:num_read], digest)
    return content


def _read_verified(folder: Path, digest: str) -> bytes:
    try:
        content = content_path(folder, digest).read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{digest} is not in the store; it was deleted, or never uploaded") from None
    verify_bytes(content, digest)
    return content
