"""The catalogue's tables and its SQLite engine: WAL, synchronous=FULL, explicit transactions.

Why FULL: with NORMAL a commit that was acknowledged may be gone after a power cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqlalchemy import (
    CheckConstraint,
    Column,
    Connection,
    Engine,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Select,
    Table,
    Text,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.engine import URL

SCHEMA_VERSION = 3
APPLICATION_ID = 0x54494D42
"""``TIMB``, in SQLite's header: tells our file from any other database."""

_BUSY_TIMEOUT_S = 30.0

metadata = MetaData()

manifests = Table(
    "manifests",
    metadata,
    Column("digest", Text, primary_key=True),
    Column("content", LargeBinary, nullable=False),
    Column("config_digest", Text, nullable=False, index=True),
    Column("tensors_digest", Text, nullable=False, index=True),
    Column("derived_digest", Text, index=True),
)
"""One row for each digest that a version refers to; the same bytes as the manifest's file."""

mixes = Table(
    "mixes",
    metadata,
    Column("digest", Text, ForeignKey("manifests.digest"), primary_key=True),
    Column("parent", Text, ForeignKey("manifests.digest"), primary_key=True, index=True),
)
"""Which manifests a mix's stands on: they cannot be deleted before it."""

versions = Table(
    "versions",
    metadata,
    Column("name", Text, primary_key=True),
    Column("version", Integer, CheckConstraint("version >= 1"), primary_key=True),
    Column("digest", Text, ForeignKey("manifests.digest"), nullable=False),
    Column("created_s", Float, nullable=False),
    Index("versions_by_digest", "digest"),
)

counters = Table(
    "counters",
    metadata,
    Column("name", Text, primary_key=True),
    Column("last_version", Integer, nullable=False),
)
"""The highest version that a name ever had. Outlives the versions, so that no number is used twice."""

aliases = Table(
    "aliases",
    metadata,
    Column("alias", Text, primary_key=True),
    Column("name", Text, nullable=False, index=True),
    Column("version", Integer),
)
"""``version`` null: the alias follows the name's latest version."""


def latest_versions() -> Select[tuple[str, int]]:
    """Each name that has versions, and the last of them."""
    return select(versions.c.name, func.max(versions.c.version).label("version")).group_by(versions.c.name)


def open_engine(path: Path) -> Engine:
    """An engine whose connections any thread may use. ``execution_options(immediate=True)`` takes the write
    lock at the beginning of a transaction, so that what it reads is what it changes."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        connect_args={"timeout": _BUSY_TIMEOUT_S},
        max_overflow=-1,
    )
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)
    return engine


def _configure(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    immediate = connection.get_execution_options().get("immediate", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")
