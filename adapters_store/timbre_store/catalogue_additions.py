"""How names get new versions: a whole batch in a handful of statements, however many they are.

Runs in the caller's transaction, and knows no files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import Column, ColumnElement, Connection, exists, func, insert, select
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from timbre_store.errors import NameConflict, NotFound
from timbre_store.manifest import Manifest
from timbre_store.records import AdapterRecord, Alias
from timbre_store.tables import aliases, counters, latest_versions, manifests, mixes, versions


def refuse_aliases(connection: Connection, names: Collection[str]) -> None:
    """Raises: NameConflict if one of the names is an alias."""
    row = connection.execute(select(aliases).where(_among(aliases.c.alias, names)).limit(1)).one_or_none()
    if row is not None:
        target = Alias(row.alias, row.name, row.version).target
        raise NameConflict(f"{row.alias!r} is an alias of {target!r}; upload to that name, or choose another")


def add_versions(
    connection: Connection, arrivals: Sequence[tuple[str, Manifest]], created_s: float
) -> tuple[AdapterRecord, ...]:
    """As `Catalogue.add_versions`. A name may come more than once: each time after the one before."""
    names = {name for name, _ in arrivals}
    refuse_aliases(connection, names)
    digests = {manifest: manifest.digest for manifest in {manifest for _, manifest in arrivals}}
    latest = _latest(connection, names)
    last_versions = _last_versions(connection, names)
    records, added = [], []
    for name, manifest in arrivals:
        if name not in latest or latest[name][1] != digests[manifest]:
            last_versions[name] = last_versions.get(name, 0) + 1
            latest[name] = last_versions[name], digests[manifest], created_s
            added.append(AdapterRecord(name, *latest[name], manifest))
        records.append(AdapterRecord(name, *latest[name], manifest))
    if added:
        _add_manifests(connection, {record.digest: record.manifest for record in added})
        _add_rows(connection, added, last_versions)
    return tuple(records)


def _among(column: Column[str], texts: Iterable[str]) -> ColumnElement[bool]:
    """Whether the column is one of them. They are one parameter: SQLite bounds the number of those."""
    return column.in_(select(func.json_each(json.dumps(list(texts))).table_valued("value").c.value))


def _latest(connection: Connection, names: Collection[str]) -> dict[str, tuple[int, str, float]]:
    """Version, digest and time of the latest version of each name that has one."""
    wanted = latest_versions().where(_among(versions.c.name, names)).subquery()
    here = (versions.c.name == wanted.c.name) & (versions.c.version == wanted.c.version)
    return {
        row.name: (row.version, row.digest, row.created_s)
        for row in connection.execute(select(versions).join(wanted, here))
    }


def _last_versions(connection: Connection, names: Collection[str]) -> dict[str, int]:
    query = select(counters).where(_among(counters.c.name, names))
    return {row.name: row.last_version for row in connection.execute(query)}


def _add_manifests(connection: Connection, added: dict[str, Manifest]) -> None:
    """By digest. Raises: NotFound if a mix's parent is not there."""
    rows = [
        {
            "digest": digest,
            "content": manifest.to_bytes(),
            "config_digest": manifest.config_digest,
            "tensors_digest": manifest.tensors_digest,
            "derived_digest": manifest.derived_digest,
        }
        for digest, manifest in added.items()
    ]
    connection.execute(sqlite_insert(manifests).on_conflict_do_nothing(), rows)
    for digest, manifest in added.items():
        if manifest.recipe is not None and manifest.recipe.is_mix:
            for parent in manifest.recipe.parents:
                if connection.scalar(select(~exists().where(manifests.c.digest == parent.digest))):
                    raise NotFound(f"the adapter {parent.digest} of the mix was deleted")
                pair = {"digest": digest, "parent": parent.digest}
                connection.execute(sqlite_insert(mixes).values(pair).on_conflict_do_nothing())


def _add_rows(connection: Connection, added: Sequence[AdapterRecord], last_versions: dict[str, int]) -> None:
    count = sqlite_insert(counters)
    count = count.on_conflict_do_update(
        index_elements=["name"], set_={"last_version": count.excluded.last_version}
    )
    names = {record.name for record in added}
    connection.execute(count, [{"name": name, "last_version": last_versions[name]} for name in names])
    columns = ("name", "version", "digest", "created_s")
    connection.execute(
        insert(versions), [{column: getattr(record, column) for column in columns} for record in added]
    )
