"""Uploads into a store until its disk refuses, in a process of its own, and prints what happened.

    full_disk_child.py tmpfs <root>      on a small file system mounted at <root>'s parent
    full_disk_child.py rlimit <root>     with a limit on the size of any file that this process writes

Last line: the versions stored, then ``blob`` or ``catalogue``: which of the two was refused.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import samples

from timbre_store.errors import StoreFull
from timbre_store.store import Store


def fill_with_blobs(store: Store) -> int:
    """Blobs stored before the first that did not fit, the size of half a mebibyte each."""
    for count in range(1000):
        try:
            samples.put(store, count.to_bytes(4, "big") * (1 << 17))
        except StoreFull:
            return count
    raise SystemExit("the disk took 500 MiB")


def fill_with_adapters(store: Store) -> int:
    for count in range(1000):
        try:
            samples.upload(store, "a", count)
        except StoreFull:
            return count
    raise SystemExit("the disk took 1,000 adapters")


def main() -> None:
    kind, root = sys.argv[1], Path(sys.argv[2])
    with samples.open_store(root) as store:
        kept = samples.upload(store, "kept", 1)
        if kind == "rlimit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
        blobs = fill_with_blobs(store)
        temps_left = len(list((root / "tmp").iterdir()))
        adapters = fill_with_adapters(store)
        temps_left += len(list((root / "tmp").iterdir()))
        readable = store.resolve("kept") == kept
        faults = store.check_integrity()
        if kind == "rlimit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.collect_garbage(min_age_s=-1)
        versions = samples.upload(store, "a", 5000).version
        print(blobs > 0, temps_left, readable, faults, versions - adapters, store.check_integrity())


if __name__ == "__main__":
    main()
