"""The points between two writes where a crash leaves the disk in a state of its own.

The store calls its ``reach`` hook with each name as it gets there. In service the hook does nothing; the
crash test kills its process in it. `FORMAT.md` has a row for each of these names.
"""

from __future__ import annotations

from collections.abc import Callable

Reach = Callable[[str], None]
"""Called with a name of `FAIL_POINTS`. May return, raise, or end the process."""

FAIL_POINTS = (
    "open.locked",
    "open.temps_removed",
    "catalogue.file_made",
    "catalogue.tables_made",
    "blobs.temp_made",
    "blobs.written",
    "blobs.synced",
    "blobs.folder_made",
    "blobs.renamed",
    "blobs.published",
    "register.examined",
    "manifests.temp_made",
    "manifests.written",
    "manifests.synced",
    "manifests.folder_made",
    "manifests.renamed",
    "manifests.published",
    "version.inserted",
    "version.committed",
    "alias.written",
    "alias.committed",
    "delete.written",
    "delete.committed",
    "blobs.removed",
    "manifests.removed",
)


def pass_by(point: str) -> None:
    """The hook in service: nothing happens."""
