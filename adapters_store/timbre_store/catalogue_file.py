"""Opens the catalogue's file, makes it where there is none, and refuses what is not ours to read."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from timbre_store.durable import full_disk_as_store_full, sync_folder
from timbre_store.errors import StoreFull, StoreUnavailable
from timbre_store.failpoints import Reach
from timbre_store.layout import FILE_MODE
from timbre_store.tables import APPLICATION_ID, SCHEMA_VERSION, manifests, metadata, mixes, open_engine

_FULL_OR_FAILING = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CANTOPEN})


def open_catalogue(path: Path, *, may_create: bool, reach: Reach) -> Engine:
    """An engine on a catalogue of our schema version, created durably if absent and ``may_create``.

    Raises: StoreUnavailable for another schema version, another program's database, a damaged file, or an
    absent catalogue where there should be one; StoreFull.
    """
    with full_disk_as_store_full():
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, FILE_MODE))
        sync_folder(path.parent)
    reach("catalogue.file_made")
    engine = open_engine(path)
    try:
        with translated_errors():
            _check_or_create(engine, may_create=may_create)
    except BaseException:
        engine.dispose()
        raise
    reach("catalogue.tables_made")
    return engine


def _check_or_create(engine: Engine, *, may_create: bool) -> None:
    with engine.execution_options(immediate=True).begin() as connection:
        application = connection.exec_driver_sql("PRAGMA application_id").scalar_one()
        schema = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
        table_count = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar_one()
        if application == 0 and schema == 0 and table_count == 0:
            if not may_create:
                raise StoreUnavailable(
                    "the store has files but an empty catalogue; restore catalogue.sqlite3 from a backup, "
                    "or move the folder away to begin anew"
                )
            metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.exec_driver_sql(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif application != APPLICATION_ID:
            raise StoreUnavailable("catalogue.sqlite3 is another program's database; choose another folder")
        elif not 1 <= schema <= SCHEMA_VERSION:
            raise StoreUnavailable(
                f"the catalogue has schema version {schema}; this version reads {SCHEMA_VERSION}. "
                "Use the version that wrote it, or restore a backup"
            )
        else:
            for step in (_to_version_2, _to_version_3)[schema - 1 :]:
                step(connection)


def _to_version_2(connection: Connection) -> None:
    """Manifests may refer to a third blob; none does yet."""
    connection.exec_driver_sql("ALTER TABLE manifests ADD COLUMN derived_digest TEXT")
    index = next(index for index in manifests.indexes if "derived_digest" in index.columns)
    index.create(connection)
    connection.exec_driver_sql("PRAGMA user_version = 2")


def _to_version_3(connection: Connection) -> None:
    """Manifests may be mixes of others; none is yet."""
    mixes.create(connection)
    connection.exec_driver_sql("PRAGMA user_version = 3")


@contextmanager
def translated_errors() -> Iterator[None]:
    """SQLite's failures in the store's words; our own programming errors pass through."""
    try:
        yield
    except DBAPIError as error:
        code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF
        if code in _FULL_OR_FAILING:
            raise StoreFull(
                f"the catalogue cannot be written ({error.orig}); free or mend the disk"
            ) from error
        if code in _DAMAGED:
            raise StoreUnavailable(
                f"the catalogue is damaged ({error.orig}); restore it from a backup"
            ) from error
        if code == sqlite3.SQLITE_BUSY:
            raise StoreUnavailable("another process holds the catalogue; try again") from error
        raise
