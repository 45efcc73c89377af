"""A folder of write-once files named by the SHA-256 of their bytes, and when one may be removed.

No file here is ever modified: a name's bytes are the same for ever, so readers need no lock. A file is
removed only if nothing *refers* to it (the catalogue, asked through ``referenced``) and nobody *holds* it
(work in progress in this process). Holds live in memory; what a crash leaves unheld and unreferenced is
taken by `collect` when it is old enough.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from threading import Lock

from timbre_store.digests import is_digest
from timbre_store.durable import make_folder, sync_folder
from timbre_store.errors import NotFound
from timbre_store.failpoints import Reach
from timbre_store.layout import content_path
from timbre_store.writer import BlobWriter

DIGESTS_AT_ONCE = 1000
"""In one question to the catalogue."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What a collection freed."""

    files: int = 0
    bytes: int = 0

    def __add__(self, other: Removed) -> Removed:
        return Removed(self.files + other.files, self.bytes + other.bytes)


class ContentFolder:
    """Thread-safe. One lock covers the instants in which files appear, vanish and change hands."""

    def __init__(
        self, folder: Path, tmp: Path, referenced: Callable[[Collection[str]], set[str]], reach: Reach
    ) -> None:
        """``referenced`` gives those of some digests that something refers to."""
        self._folder = folder
        self._tmp = tmp
        self._referenced = referenced
        self._reach_point = reach
        self._lock = Lock()
        self._holds: Counter[str] = Counter()
        self._provisional: set[str] = set()
        """Held files that came for the holder's purpose only: the last holder takes them away again."""
        for needed in (folder, folder / "sha256"):
            make_folder(needed)

    def path(self, digest: str) -> Path:
        return content_path(self._folder, digest)

    def has(self, digest: str) -> bool:
        return is_digest(digest) and self.path(digest).exists()

    def require(self, digest: str) -> Path:
        """The file's path. Raises: NotFound."""
        path = self.path(digest)
        if not path.exists():
            raise NotFound(f"no {self._folder.name[:-1]} {digest} is stored; upload it first")
        return path

    def digests(self) -> Iterator[str]:
        return chain.from_iterable(self._shards())

    def _shards(self) -> Iterator[list[str]]:
        for shard in sorted((self._folder / "sha256").iterdir()):
            yield [f"sha256:{path.name}" for path in sorted(shard.iterdir())]

    def begin(self, max_bytes: int) -> BlobWriter:
        """A writer whose blob stays until `collect` finds it old and unreferenced."""
        return BlobWriter(self._tmp, max_bytes, self._publish_to_keep, self._reach)

    def begin_held(self, max_bytes: int, on_held: Callable[[str], None]) -> BlobWriter:
        """A writer whose blob is held for the caller, who is told its digest and must `release` it."""

        def publish(temp_path: Path, digest: str) -> None:
            self._publish_held(temp_path, digest)
            on_held(digest)

        return BlobWriter(self._tmp, max_bytes, publish, self._reach)

    @contextmanager
    def holding(self, *digests: str) -> Iterator[None]:
        """Nothing removes these digests' files within the block, whether or not they are there already."""
        with self._lock:
            self._holds.update(digests)
        try:
            yield
        finally:
            self.release(*digests)

    def release(self, *digests: str) -> None:
        """Give up one hold of each. The last one removes a provisional file that nothing has come to refer
        to."""
        with self._lock:
            self._holds.subtract(digests)
            let_go = {digest for digest in digests if self._holds[digest] <= 0}
            for digest in let_go:
                del self._holds[digest]
            provisional = sorted(let_go & self._provisional)
            self._provisional.difference_update(provisional)
            for digest in self._unreferenced(provisional):
                self._remove(digest)

    def touch(self, digest: str) -> None:
        """Let the file's age count from now: it has just lost its last reference."""
        if self.has(digest):
            os.utime(self.path(digest))

    def collect(self, min_age_s: float, now_s: float) -> Removed:
        """Remove files that nothing refers to, nobody holds, and that are at least this old."""
        removed = Removed()
        for digest in list(chain.from_iterable(map(self._unreferenced, self._shards()))):
            with self._lock:
                path = self.path(digest)
                if digest in self._holds or not path.exists():
                    continue
                if now_s - path.stat().st_mtime >= min_age_s and not self._referenced([digest]):
                    removed += self._remove(digest)
        return removed

    def _unreferenced(self, digests: Sequence[str]) -> Iterator[str]:
        """Asked together: one by one, the question would be put for every file of a large store."""
        for start in range(0, len(digests), DIGESTS_AT_ONCE):
            batch = digests[start : start + DIGESTS_AT_ONCE]
            known = self._referenced(batch)
            yield from (digest for digest in batch if digest not in known)

    def _publish_to_keep(self, temp_path: Path, digest: str) -> None:
        with self._lock:
            self._move_into_place(temp_path, digest)
            self._provisional.discard(digest)

    def _publish_held(self, temp_path: Path, digest: str) -> None:
        with self._lock:
            is_new = not self.has(digest)
            self._move_into_place(temp_path, digest)
            self._holds[digest] += 1
            if is_new:
                self._provisional.add(digest)

    def _move_into_place(self, temp_path: Path, digest: str) -> None:
        """Also over an existing file: its bytes should be equal, and if the disk damaged them it heals."""
        target = self.path(digest)
        make_folder(target.parent)
        self._reach("folder_made")
        os.replace(temp_path, target)
        self._reach("renamed")
        sync_folder(target.parent)
        self._reach("published")

    def _remove(self, digest: str) -> Removed:
        path = self.path(digest)
        if not path.exists():
            return Removed()
        size = path.stat().st_size
        path.unlink()
        self._reach("removed")
        return Removed(1, size)

    def _reach(self, point: str) -> None:
        self._reach_point(f"{self._folder.name}.{point}")
