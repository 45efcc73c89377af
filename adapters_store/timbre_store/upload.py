"""What one client sends for one adapter: blobs that stay only if an adapter comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from types import TracebackType

from timbre_store.content import ContentFolder
from timbre_store.recipe import Recipe
from timbre_store.writer import BlobWriter


@dataclass(frozen=True, slots=True)
class Arrival:
    """Two stored blobs that shall become a version of a name."""

    name: str
    config_digest: str
    tensors_digest: str
    recipe: Recipe | None = None
    """Where the server made them of other adapters."""


class Upload:
    """Use as a context manager around the blobs and the `Store.register` that they are for.

    Leaving it takes away every blob that it brought, that was not stored before, and that no adapter refers
    to, whatever the reason: a refusal, a client that went away, a bug. Within it, nothing takes them away.
    A blob that a left-behind thread commits after that is taken away at once.
    """

    def __init__(self, blobs: ContentFolder, max_blob_bytes: int) -> None:
        self._blobs = blobs
        self._max_blob_bytes = max_blob_bytes
        self._held: list[str] = []
        self._left = False
        self._lock = Lock()

    def begin_blob(self, max_bytes: int | None = None) -> BlobWriter:
        limit = self._max_blob_bytes if max_bytes is None else min(max_bytes, self._max_blob_bytes)
        return self._blobs.begin_held(limit, self._keep)

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._left = True
        self._blobs.release(*self._held)

    def _keep(self, digest: str) -> None:
        with self._lock:
            if not self._left:
                self._held.append(digest)
                return
        self._blobs.release(digest)
