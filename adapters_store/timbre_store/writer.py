"""One blob on its way in: bytes go to a temporary file and are hashed as they pass."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from types import TracebackType

from timbre_store.digests import digest_of_hash
from timbre_store.durable import full_disk_as_store_full
from timbre_store.errors import BlobTooLarge, DigestMismatch
from timbre_store.failpoints import Reach
from timbre_store.layout import WRITE_ONCE_MODE


class BlobWriter:
    """Use as a context manager: leaving it without `commit` leaves nothing.

    It may be left while another thread is still in `write` or `commit`, as when a request is cancelled while
    its worker thread goes on: leaving waits for that call, and a later one raises ValueError.

    ``publish(temp_path, digest)`` moves a finished, synced file to its place and is durable when it returns.
    """

    def __init__(
        self, tmp: Path, max_bytes: int, publish: Callable[[Path, str], None], reach: Callable[[str], None]
    ) -> None:
        self._max_bytes = max_bytes
        self._publish = publish
        self._reach: Reach = reach
        self._running = hashlib.sha256()
        self._committed = False
        self._lock = Lock()
        self.size_bytes = 0
        with full_disk_as_store_full():
            descriptor, name = tempfile.mkstemp(dir=tmp)
        self._temp_path = Path(name)
        self._file = os.fdopen(descriptor, "wb", buffering=0)
        self._reach("temp_made")

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append bytes. Raises: BlobTooLarge as soon as the limit is passed; StoreFull."""
        self.size_bytes += len(chunk)
        if self.size_bytes > self._max_bytes:
            raise BlobTooLarge(f"the upload has more than {self._max_bytes} bytes, the limit for this file")
        with self._lock, full_disk_as_store_full():
            self._running.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[self._file.write(rest) :]

    def commit(self, expected_digest: str | None = None) -> str:
        """Make the blob durable under its digest, and return the digest. Only once, after the last write.

        Raises: DigestMismatch if the bytes are not those of ``expected_digest``; StoreFull.
        """
        digest = digest_of_hash(self._running)
        if expected_digest is not None and digest != expected_digest:
            raise DigestMismatch(f"the uploaded bytes hash to {digest}; expected {expected_digest[:80]}")
        self._reach("written")
        with self._lock, full_disk_as_store_full():
            os.fchmod(self._file.fileno(), WRITE_ONCE_MODE)
            os.fsync(self._file.fileno())
            self._reach("synced")
            self._publish(self._temp_path, digest)
            self._committed = True
        return digest

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._file.close()
            if not self._committed:
                self._temp_path.unlink(missing_ok=True)
