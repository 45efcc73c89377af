"""SHA-256 digests as text, ``sha256:`` and 64 lower-case hex digits: the only identity in the store."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from timbre_store.errors import DigestMismatch

_PREFIX = "sha256:"
_PATTERN = re.compile(r"sha256:[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


def is_digest(text: str) -> bool:
    return _PATTERN.fullmatch(text) is not None


def digest_of_hash(running: hashlib._Hash) -> str:
    return _PREFIX + running.hexdigest()


def digest_of_bytes(content: bytes | bytearray | memoryview) -> str:
    return digest_of_hash(hashlib.sha256(content))


def digest_of_file(path: Path) -> str:
    """Reads the whole file, in chunks of 1 MiB."""
    running = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            running.update(chunk)
    return digest_of_hash(running)


def hex_of(digest: str) -> str:
    return digest.removeprefix(_PREFIX)


def verify_bytes(content: bytes | bytearray | memoryview, digest: str) -> None:
    """Raises: DigestMismatch if these are not the digest's bytes."""
    _compare(digest_of_bytes(content), digest)


def verify_file(path: Path, digest: str) -> None:
    """Raises: DigestMismatch if the file's bytes are not the digest's."""
    _compare(digest_of_file(path), digest)


def _compare(found: str, expected: str) -> None:
    if found != expected:
        raise DigestMismatch(
            f"a stored file hashes to {found}; expected {expected}. Upload it again to heal it"
        )
