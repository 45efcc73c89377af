"""Where each thing lies below the root. This is the whole layout:

    <root>/
      lock                              held (flock) by the one process that writes
      catalogue.sqlite3 [-wal] [-shm]   names, versions, aliases
      blobs/sha256/ab/<64 hex>          uploaded bytes, write-once
      manifests/sha256/ab/<64 hex>      canonical JSON, write-once
      tmp/                              uploads on their way; emptied at start-up

``ab`` are the first two hex digits of the name. Paths are made from digests that matched a pattern and from
the constants here, never from a client's text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from timbre_store.digests import hex_of, is_digest
from timbre_store.errors import NotFound

FOLDER_MODE = 0o700
FILE_MODE = 0o600
WRITE_ONCE_MODE = 0o400


def content_path(folder: Path, digest: str) -> Path:
    """The place of a digest's bytes below ``blobs`` or ``manifests``, whether there or not.

    Raises: NotFound for text that is no digest.
    """
    if not is_digest(digest):
        raise NotFound(f"{digest[:80]!r} is not a digest; expected 'sha256:' and 64 lower-case hex digits")
    name = hex_of(digest)
    return folder / "sha256" / name[:2] / name


@dataclass(frozen=True, slots=True)
class Layout:
    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue.sqlite3"

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def manifests(self) -> Path:
        return self.root / "manifests"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"
