"""Checks the laws of catalogue and folders against each other. Reads only; for tests and for people."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection, select

from timbre_store.catalogue import Catalogue
from timbre_store.catalogue_reads import aliases_of, find_record
from timbre_store.digests import digest_of_file
from timbre_store.errors import StoreError
from timbre_store.layout import Layout
from timbre_store.manifest import Manifest
from timbre_store.names import Reference
from timbre_store.reader import open_adapter
from timbre_store.tables import counters, manifests, mixes, versions


def find_faults(catalogue: Catalogue, layout: Layout) -> tuple[str, ...]:
    with catalogue.reading() as connection:
        return (*_database(connection), *_names(connection), *_adapters(connection, layout), *_files(layout))


def _database(connection: Connection) -> Iterator[str]:
    for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
        if line != "ok":
            yield f"SQLite: {line}"
    for row in connection.exec_driver_sql("PRAGMA foreign_key_check"):
        yield f"a row of {row[0]} refers to a row that is not there"


def _names(connection: Connection) -> Iterator[str]:
    last_versions = {row.name: row.last_version for row in connection.execute(select(counters))}
    adapter_names = set()
    for name, version in connection.execute(select(versions.c.name, versions.c.version)):
        adapter_names.add(name)
        if version > last_versions.get(name, 0):
            yield f"{name}@{version} is above the name's last version, {last_versions.get(name)}"
    for alias in aliases_of(connection, None):
        if alias.alias in adapter_names:
            yield f"{alias.alias!r} is an adapter and an alias"
        if find_record(connection, Reference(alias.name, version=alias.version), missing_ok=True) is None:
            yield f"alias {alias.alias!r} points at {alias.target!r}, which is not there"


def _adapters(connection: Connection, layout: Layout) -> Iterator[str]:
    used = set(connection.scalars(select(versions.c.digest)))
    for row in connection.execute(select(manifests)):
        if row.digest not in used:
            yield f"no version refers to the manifest {row.digest}"
        try:
            manifest = Manifest.from_bytes(row.content)
            files = open_adapter(layout.root, row.digest)
        except StoreError as error:
            yield str(error)
            continue
        if manifest.digest != row.digest or files.manifest != manifest:
            yield f"the catalogue's copy of the manifest {row.digest} is not the file's"
        found = (row.config_digest, row.tensors_digest, row.derived_digest)
        if found != (manifest.config_digest, manifest.tensors_digest, manifest.derived_digest):
            yield f"the catalogue's digests of the files of {row.digest} are not the manifest's"
        recipe = manifest.recipe
        parents = {parent.digest for parent in recipe.parents} if recipe and recipe.is_mix else set()
        if parents != set(connection.scalars(select(mixes.c.parent).where(mixes.c.digest == row.digest))):
            yield f"the catalogue's parents of {row.digest} are not the manifest's"


def _files(layout: Layout) -> Iterator[str]:
    for folder in (layout.blobs, layout.manifests):
        for path in folder.glob("sha256/*/*"):
            if path.parent.name != path.name[:2] or digest_of_file(path) != f"sha256:{path.name}":
                yield f"{folder.name}: the file {path.name} does not hold the bytes of its name"
