"""Names, versions and aliases, in SQLite. Knows digests and manifests, but no files.

Every change is one transaction: after a crash it happened or it did not. Laws between transactions, which
`integrity` checks:

* a name is an adapter's or an alias's, never both;
* a version number of a name is given once, even after it was deleted;
* an alias always resolves;
* a manifest has a row here if and only if a version refers to it;
* so have all that a mix's manifest stands on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock

from sqlalchemy import Column, Connection, Engine, delete, exists, select
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from timbre_store.catalogue_additions import add_versions, refuse_aliases
from timbre_store.catalogue_file import translated_errors
from timbre_store.catalogue_reads import (
    aliases_of,
    find_alias,
    find_record,
    parts_of,
    record_of,
    select_names,
    select_records,
)
from timbre_store.errors import AdapterInUse, NameConflict, NotFound
from timbre_store.failpoints import Reach
from timbre_store.manifest import Manifest
from timbre_store.names import Reference
from timbre_store.records import AdapterRecord, Alias, Named, Page
from timbre_store.tables import aliases, latest_versions, manifests, mixes, versions


class Catalogue:
    """Thread-safe. Owns the engine and closes it."""

    def __init__(self, engine: Engine, reach: Reach) -> None:
        self._engine = engine
        self._writing_engine = engine.execution_options(immediate=True)
        self._write_lock = Lock()  # waiting here is fair and wakes at once; SQLite's own waiting polls
        self._reach = reach

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view."""
        with translated_errors(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._write_lock, translated_errors(), self._writing_engine.begin() as connection:
            yield connection

    def resolve(self, reference: Reference) -> AdapterRecord:
        """Raises: NotFound."""
        with self.reading() as connection:
            record = find_record(connection, reference)
            return replace(record, parts=parts_of(connection, record))

    def versions_of(self, name: str) -> tuple[AdapterRecord, ...]:
        """Oldest first; empty for a name that has none."""
        with self.reading() as connection:
            query = select_records().where(versions.c.name == name).order_by(versions.c.version)
            return tuple(map(record_of, connection.execute(query)))

    def page(self, limit: int, after: str | None) -> Page[AdapterRecord]:
        """The latest version of each name, in order of names."""
        latest = latest_versions()
        if after is not None:
            latest = latest.where(versions.c.name > after)
        wanted = latest.order_by(versions.c.name).limit(limit + 1).subquery()
        here = (versions.c.name == wanted.c.name) & (versions.c.version == wanted.c.version)
        with self.reading() as connection:
            rows = connection.execute(select_records().join(wanted, here).order_by(versions.c.name)).all()
        items = tuple(map(record_of, rows[:limit]))
        return Page(items, items[-1].name if len(rows) > limit else None)

    def page_of_names(self, limit: int, after: str | None) -> Page[Named]:
        """Names and aliases in one order, with what each leads to."""
        wanted = select_names(limit + 1, after).subquery()
        here = (versions.c.name == wanted.c.name) & (versions.c.version == wanted.c.version)
        query = select_records().add_columns(wanted.c.id).join(wanted, here).order_by(wanted.c.id)
        with self.reading() as connection:
            rows = connection.execute(query).all()
        items = tuple(Named(row.id, record_of(row)) for row in rows[:limit])
        return Page(items, items[-1].name if len(rows) > limit else None)

    def aliases(self, name: str | None = None) -> tuple[Alias, ...]:
        """In order of aliases; those of one adapter, or all."""
        with self.reading() as connection:
            return aliases_of(connection, name)

    def check_names_are_free_for_adapters(self, names: Collection[str]) -> None:
        """Raises: NameConflict if one is an alias."""
        with self.reading() as connection:
            refuse_aliases(connection, names)

    def referenced_blobs(self, digests: Collection[str]) -> set[str]:
        """Those of them that are an adapter's files."""
        columns = (manifests.c.config_digest, manifests.c.tensors_digest, manifests.c.derived_digest)
        return self._mentioned(digests, columns)

    def derived_digest_of(
        self,
        config_digest: str,
        tensors_digest: str,
        base_model: str | None,
        derivations: Mapping[str, int],
    ) -> str | None:
        """What was derived for an adapter of these files on this base, as its method does it by its count in
        ``derivations``, or 1; None where nothing was."""
        columns = manifests.c.config_digest, manifests.c.tensors_digest
        query = select(manifests.c.content).where(columns[0] == config_digest, columns[1] == tensors_digest)
        with self.reading() as connection:
            found = [Manifest.from_bytes(content) for content in connection.scalars(query)]
        return next(
            (
                each.derived_digest
                for each in found
                if each.base_model_digest == base_model and each.derivation == derivations.get(each.method, 1)
            ),
            None,
        )

    def referenced_manifests(self, digests: Collection[str]) -> set[str]:
        """Those of them that a version refers to."""
        return self._mentioned(digests, (manifests.c.digest,))

    def _mentioned(self, digests: Collection[str], columns: Sequence[Column[str]]) -> set[str]:
        with self.reading() as connection:
            queries = (select(column).where(column.in_(digests)).distinct() for column in columns)
            return {digest for query in queries for digest in connection.scalars(query)}

    def add_versions(
        self, arrivals: Sequence[tuple[str, Manifest]], created_s: float
    ) -> tuple[AdapterRecord, ...]:
        """A new version of each name, or its latest one if that is this very manifest; all of them or none.

        Raises: NameConflict if a name is an alias; NotFound if a mix's parent is not there.
        """
        with self._writing() as connection:
            records = add_versions(connection, arrivals, created_s)
            self._reach("version.inserted")
        self._reach("version.committed")
        return records

    def set_alias(self, alias: str, target: Reference) -> AdapterRecord:
        """Point the alias, new or old, at a name or at one version of it. What it points at now.

        Raises: NotFound if the target does not resolve; NameConflict if the alias is an adapter's name, or
        the target an alias's.
        """
        with self._writing() as connection:
            if find_record(connection, Reference(alias), missing_ok=True, follow=False) is not None:
                raise NameConflict(f"{alias!r} is an adapter; an alias needs a name of its own")
            if find_alias(connection, target.name) is not None:
                raise NameConflict(f"{target.name!r} is an alias itself; point at the adapter's own name")
            record = find_record(connection, target)
            pinned = target.version is not None or target.digest is not None
            goal = {"name": record.name, "version": record.version if pinned else None}
            statement = sqlite_insert(aliases).values(alias=alias, **goal)
            connection.execute(statement.on_conflict_do_update(index_elements=["alias"], set_=goal))
            self._reach("alias.written")
        self._reach("alias.committed")
        return record

    def delete(self, reference: Reference) -> tuple[Manifest, ...]:
        """Remove an alias, a name with all its versions, or one version. The manifests that nothing refers
        to any longer.

        Raises: NotFound; AdapterInUse if an alias would be left pointing at nothing.
        """
        with self._writing() as connection:
            if find_alias(connection, reference.name) is not None:
                freed = _delete_alias(connection, reference)
            else:
                freed = _delete_versions(connection, reference)
            self._reach("delete.written")
        self._reach("delete.committed")
        return freed


def _delete_alias(connection: Connection, reference: Reference) -> tuple[Manifest, ...]:
    if reference != Reference(reference.name):
        raise NotFound(f"{reference.name!r} is an alias; delete it by its name alone, without '@'")
    connection.execute(delete(aliases).where(aliases.c.alias == reference.name))
    return ()


def _delete_versions(connection: Connection, reference: Reference) -> tuple[Manifest, ...]:
    record = find_record(connection, reference)
    of_name = versions.c.name == record.name
    if reference == Reference(record.name):
        doomed = of_name
    elif reference.digest is not None:
        doomed = of_name & (versions.c.digest == reference.digest)
    else:
        doomed = of_name & (versions.c.version == reference.version)
    freed = set(connection.scalars(delete(versions).where(doomed).returning(versions.c.digest)))
    for alias in aliases_of(connection, record.name):
        pointed_at = Reference(alias.name, version=alias.version)
        if find_record(connection, pointed_at, missing_ok=True) is None:
            raise AdapterInUse(
                f"alias {alias.alias!r} points at {alias.target!r}; move or delete the alias first"
            )
    gone = [d for d in sorted(freed) if not connection.scalar(select(exists().where(versions.c.digest == d)))]
    connection.execute(delete(mixes).where(mixes.c.digest.in_(gone)))  # One of them may stand on another.
    return tuple(_drop(connection, digest) for digest in gone)


def _drop(connection: Connection, digest: str) -> Manifest:
    """Of a manifest that no version refers to. Raises: AdapterInUse if a mix stands on it."""
    standing = select(versions.c.name, versions.c.version).join(mixes, mixes.c.digest == versions.c.digest)
    mix = connection.execute(standing.where(mixes.c.parent == digest).limit(1)).one_or_none()
    if mix is not None:
        raise AdapterInUse(f"the mix {mix.name}@{mix.version} is made of it; delete the mix first")
    gone = delete(manifests).where(manifests.c.digest == digest).returning(manifests.c.content)
    return Manifest.from_bytes(connection.execute(gone).scalar_one())
