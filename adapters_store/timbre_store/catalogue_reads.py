"""The catalogue's queries that more than one transaction needs. Each runs in the caller's."""

from __future__ import annotations

from typing import Any, Literal, overload

from sqlalchemy import CompoundSelect, Connection, Row, Select, func, select, union_all

from timbre_store.errors import NotFound
from timbre_store.manifest import Manifest
from timbre_store.names import Reference
from timbre_store.records import AdapterRecord, Alias, MixPart
from timbre_store.tables import aliases, counters, latest_versions, manifests, versions

RecordRow = tuple[str, int, str, float, bytes]


def select_records() -> Select[Any]:
    columns = (
        versions.c.name,
        versions.c.version,
        versions.c.digest,
        versions.c.created_s,
        manifests.c.content,
    )
    return select(*columns).join_from(versions, manifests, versions.c.digest == manifests.c.digest)


def select_names(limit: int, after: str | None) -> CompoundSelect[str, str, int]:
    """The first names and aliases behind ``after``, and the version of an adapter that each leads to."""
    own = latest_versions().order_by(versions.c.name).limit(limit)
    others = select(aliases).order_by(aliases.c.alias).limit(limit)
    if after is not None:
        own, others = own.where(versions.c.name > after), others.where(aliases.c.alias > after)
    names, pointers = own.subquery(), others.subquery()  # Cut apart: of both, SQLite would read all to sort.
    latest = select(func.max(versions.c.version)).where(versions.c.name == pointers.c.name).scalar_subquery()
    either = union_all(
        select(names.c.name.label("id"), names.c.name, names.c.version),
        select(pointers.c.alias, pointers.c.name, func.coalesce(pointers.c.version, latest)),
    )
    return either.order_by("id").limit(limit)


def record_of(row: Row[Any]) -> AdapterRecord:
    manifest = Manifest.of_digest(row.content, row.digest)
    return AdapterRecord(row.name, row.version, row.digest, row.created_s, manifest)


def parts_of(connection: Connection, record: AdapterRecord) -> tuple[MixPart, ...]:
    """What a mix stands for, each part under the first name that leads to it; empty for other adapters."""
    recipe = record.manifest.recipe
    if recipe is None or not recipe.is_mix:
        return ()
    parts = []
    for parent in recipe.parents:
        query = select_records().where(versions.c.digest == parent.digest)
        row = connection.execute(query.order_by(versions.c.name, versions.c.version).limit(1)).one()
        parts.append(MixPart(record_of(row), parent.weight))
    return tuple(parts)


def find_alias(connection: Connection, alias: str) -> Alias | None:
    row = connection.execute(select(aliases).where(aliases.c.alias == alias)).one_or_none()
    return None if row is None else Alias(row.alias, row.name, row.version)


def aliases_of(connection: Connection, name: str | None) -> tuple[Alias, ...]:
    query = select(aliases).order_by(aliases.c.alias)
    if name is not None:
        query = query.where(aliases.c.name == name)
    return tuple(Alias(row.alias, row.name, row.version) for row in connection.execute(query))


@overload
def find_record(connection: Connection, reference: Reference) -> AdapterRecord: ...
@overload
def find_record(
    connection: Connection, reference: Reference, *, missing_ok: Literal[True], follow: bool = ...
) -> AdapterRecord | None: ...
def find_record(
    connection: Connection, reference: Reference, *, missing_ok: bool = False, follow: bool = True
) -> AdapterRecord | None:
    """The version that a reference means, through an alias too unless ``follow`` is false.

    Raises: NotFound, unless ``missing_ok``.
    """
    query = select_records().where(versions.c.name == reference.name)
    if reference.version is not None:
        query = query.where(versions.c.version == reference.version)
    if reference.digest is not None:
        query = query.where(versions.c.digest == reference.digest)
    row = connection.execute(query.order_by(versions.c.version.desc()).limit(1)).one_or_none()
    if row is not None:
        return record_of(row)
    alias = find_alias(connection, reference.name) if follow else None
    if alias is not None and reference == Reference(reference.name):
        return find_record(connection, Reference(alias.name, version=alias.version))
    if missing_ok:
        return None
    raise NotFound(_why_missing(connection, reference, alias))


def _why_missing(connection: Connection, reference: Reference, alias: Alias | None) -> str:
    if alias is not None:
        return f"{reference.name!r} is an alias of {alias.target!r}; '@' goes with an adapter's own name"
    last = connection.scalar(select(counters.c.last_version).where(counters.c.name == reference.name))
    latest = connection.scalar(
        select(versions.c.version)
        .where(versions.c.name == reference.name)
        .order_by(versions.c.version.desc())
    )
    if latest is None:
        return f"no adapter {reference.name!r}" + (" any longer: it was deleted" if last else "")
    if reference.version is not None and reference.version <= (last or 0):
        return f"version {reference.version} of {reference.name!r} was deleted; the latest is {latest}"
    pin = str(reference).partition("@")[2]
    return f"adapter {reference.name!r} has no version {pin}; the latest is {latest}"
