"""Small pieces that make a change outlive a power cut, and turn a full disk into `StoreFull`."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timbre_store.errors import StoreFull
from timbre_store.layout import FOLDER_MODE

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextmanager
def full_disk_as_store_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        reason = os.strerror(error.errno).lower()
        raise StoreFull(
            f"the store's disk cannot take more ({reason}); delete adapters or add space"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames and creations in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a private folder durably; its parent exists. Nothing happens if it is there."""
    try:
        folder.mkdir(mode=FOLDER_MODE)
    except FileExistsError:
        return
    sync_folder(folder.parent)
