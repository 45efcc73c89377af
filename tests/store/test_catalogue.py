"""Names, versions and aliases, through the store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from sqlalchemy import Engine, event

from timbre_store.errors import InvalidName, NameConflict, NotFound
from timbre_store.records import AdapterRecord, Alias
from timbre_store.store import Store
from timbre_store.upload import Arrival

NO_DIGEST = "sha256:" + "0" * 64


def test_other_content_under_a_name_is_its_next_version(store: Store, samples: ModuleType) -> None:
    first, second = samples.upload(store, "a", 1), samples.upload(store, "a", 2)
    assert (first.version, second.version) == (1, 2)
    assert first.digest != second.digest
    assert store.resolve("a") == second
    assert store.resolve("a@1") == first
    assert store.resolve(f"a@{first.digest}") == first
    assert store.versions("a") == (first, second)


def test_the_latest_content_again_is_the_latest_version(store: Store, samples: ModuleType) -> None:
    first = samples.upload(store, "a", 1)
    assert samples.upload(store, "a", 1) == first
    samples.upload(store, "a", 2)
    third = samples.upload(store, "a", 1)
    assert (third.version, third.digest) == (3, first.digest)
    assert store.resolve(f"a@{first.digest}") == third


def test_a_name_that_fell_to_its_digest_is_found_by_either(store: Store, samples: ModuleType) -> None:
    one, other = samples.upload(store, "a", 1), samples.upload(store, "b", 1)
    assert one.digest == other.digest == one.manifest.digest
    assert (one.name, other.name) == ("a", "b")


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("b", "no adapter 'b'$"),
        ("a@9", "has no version 9; the latest is 3"),
        (f"a@{NO_DIGEST}", "has no version sha256:0000"),
        ("a@2", "version 2 of 'a' was deleted; the latest is 3"),
        ("gone", "it was deleted"),
        ("alias@1", "is an alias of 'a'; '@' goes"),
        ("A", "no adapter 'A'$"),
    ],
)
def test_what_is_not_there_is_not_found_and_why(
    store: Store, samples: ModuleType, reference: str, reason: str
) -> None:
    for seed in (1, 2, 3):
        samples.upload(store, "a", seed)
    samples.upload(store, "gone", 1)
    store.set_alias("alias", "a")
    store.delete("a@2")
    store.delete("gone")
    with pytest.raises(NotFound, match=reason):
        store.resolve(reference)


def register(store: Store, samples: ModuleType, *contents: tuple[str, int]) -> tuple[AdapterRecord, ...]:
    """Names together with seeds of what they shall be."""
    with store.begin_upload() as upload:
        files = {seed: [samples.put(upload, part) for part in samples.adapter(seed)] for _, seed in contents}
        return store.register_all([Arrival(name, *files[seed]) for name, seed in contents], samples.BASE)


def test_names_that_come_together_get_what_they_would_one_after_another(
    store: Store, samples: ModuleType
) -> None:
    known = samples.upload(store, "known", 1)
    samples.upload(store, "gone", 1)
    store.delete("gone")
    given = [("new", 1), ("known", 1), ("gone", 1), ("new", 2), ("known", 3), ("new", 2), ("known", 1)]
    records = register(store, samples, *given)
    numbers = [(record.name, record.version) for record in records]
    assert numbers == [
        ("new", 1), ("known", 1), ("gone", 2), ("new", 2), ("known", 2), ("new", 2), ("known", 3)
    ]  # fmt: skip
    assert records[1] == known
    assert records[5] == records[3]
    assert [store.resolve(f"{record.name}@{record.version}") for record in records] == list(records)
    assert store.check_integrity() == ()


def test_an_alias_among_names_that_come_together_refuses_them_all(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    store.set_alias("alias", "a")
    with pytest.raises(NameConflict, match="'alias' is an alias of 'a'; upload to that name"):
        register(store, samples, ("b", 2), ("alias", 2), ("c", 2))
    assert [record.name for record in store.list(limit=9).items] == ["a"]
    assert store.check_integrity() == ()


def test_a_hundred_names_take_as_many_statements_as_two(store: Store, samples: ModuleType) -> None:
    statements: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    counts = []
    event.listen(Engine, "before_cursor_execute", note)
    try:
        for names in (2, 100):
            statements.clear()
            register(store, samples, *((f"{names}-{number}", names) for number in range(names)))
            counts.append(len(statements))
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert 0 < counts[0] == counts[1]


def test_a_version_number_is_never_used_again(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    samples.upload(store, "a", 2)
    store.delete("a@2")
    assert store.resolve("a").version == 1
    assert samples.upload(store, "a", 2).version == 3
    store.delete("a")
    assert samples.upload(store, "a", 1).version == 4


def test_an_alias_follows_a_name_or_stays_at_a_version(store: Store, samples: ModuleType) -> None:
    first = samples.upload(store, "a", 1)
    assert store.set_alias("latest", "a") == first
    assert store.set_alias("fixed", "a@1") == first
    assert store.set_alias("by-digest", f"a@{first.digest}") == first
    second = samples.upload(store, "a", 2)
    assert store.resolve("latest") == second
    assert store.resolve("fixed") == first
    assert store.aliases("a") == (
        Alias("by-digest", "a", 1),
        Alias("fixed", "a", 1),
        Alias("latest", "a", None),
    )
    assert [alias.target for alias in store.aliases()] == ["a@1", "a@1", "a"]


def test_an_alias_moves(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    other = samples.upload(store, "b", 2)
    store.set_alias("prod", "a@1")
    store.set_alias("prod", "b")
    assert store.resolve("prod") == other
    assert store.aliases("a") == ()


def test_a_name_is_an_adapter_or_an_alias(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    samples.upload(store, "b", 1)
    store.set_alias("prod", "a")
    with pytest.raises(NameConflict, match="'prod' is an alias of 'a'"):
        samples.upload(store, "prod", 2)
    with pytest.raises(NameConflict, match="'b' is an adapter"):
        store.set_alias("b", "a")
    with pytest.raises(NameConflict, match="'a' is an adapter"):
        store.set_alias("a", "a")
    with pytest.raises(NameConflict, match="'prod' is an alias itself"):
        store.set_alias("other", "prod")


def test_an_alias_needs_a_name_and_something_to_point_at(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    with pytest.raises(InvalidName):
        store.set_alias("a/b", "a")
    with pytest.raises(NotFound):
        store.set_alias("prod", "b")
    with pytest.raises(NotFound):
        store.set_alias("prod", "a@2")
    assert store.aliases() == ()


def test_what_an_alias_points_at_is_not_deleted(store: Store, samples: ModuleType) -> None:
    first, second = samples.upload(store, "a", 1), samples.upload(store, "a", 2)
    store.set_alias("fixed", "a@1")
    for reference in ("a", "a@1", f"a@{first.digest}"):
        with pytest.raises(NameConflict, match="alias 'fixed' points at 'a@1'; move or delete"):
            store.delete(reference)
    assert store.versions("a") == (first, second)
    store.set_alias("fixed", "a")
    assert store.delete("a@1") == (first.digest,)
    with pytest.raises(NameConflict):
        store.delete("a@2")
    assert store.delete("fixed") == ()
    assert store.delete("a") == (second.digest,)


def test_an_alias_is_deleted_by_its_name_alone(store: Store, samples: ModuleType) -> None:
    record = samples.upload(store, "a", 1)
    store.set_alias("prod", "a")
    with pytest.raises(NotFound, match="is an alias"):
        store.delete("prod@1")
    store.delete("prod")
    with pytest.raises(NotFound):
        store.resolve("prod")
    assert store.resolve("a") == record


def test_deleting_tells_which_digests_no_name_leads_to(store: Store, samples: ModuleType) -> None:
    shared = samples.upload(store, "a", 1).digest
    alone = samples.upload(store, "a", 2).digest
    samples.upload(store, "b", 1)
    assert store.delete("a") == (alone,)
    assert store.delete("b") == (shared,)
    with pytest.raises(NotFound):
        store.delete("b")


def test_deleting_by_digest_takes_every_version_that_has_it(store: Store, samples: ModuleType) -> None:
    digest = samples.upload(store, "a", 1).digest
    kept = samples.upload(store, "a", 2)
    samples.upload(store, "a", 1)
    assert store.delete(f"a@{digest}") == (digest,)
    assert store.versions("a") == (kept,)


def test_racing_uploads_of_one_name_each_get_a_version(store: Store, samples: ModuleType) -> None:
    start = threading.Barrier(8)

    def upload(seed: int) -> tuple[int, str]:
        start.wait()
        record = samples.upload(store, "a", seed)
        return record.version, record.digest

    with ThreadPoolExecutor(8) as threads:
        given = sorted(threads.map(upload, range(8)))
    assert [version for version, _ in given] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [(record.version, record.digest) for record in store.versions("a")] == given
    assert len({digest for _, digest in given}) == 8


def test_racing_uploads_of_the_same_adapter_are_one_version(store: Store, samples: ModuleType) -> None:
    start = threading.Barrier(8)

    def upload(_: int) -> int:
        start.wait()
        return int(samples.upload(store, "a", 1).version)

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(upload, range(8))) == {1}
    assert len(samples.files_of(store.root)) == 3


def test_an_adapter_and_an_alias_racing_for_a_name_never_share_it(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "target", 0)
    for round_number in range(10):
        name = f"n{round_number}"
        start = threading.Barrier(2)

        def upload(name: str = name, start: threading.Barrier = start) -> str:
            start.wait()
            try:
                return str(samples.upload(store, name, 1).name)
            except NameConflict:
                return "refused"

        def point(name: str = name, start: threading.Barrier = start) -> str:
            start.wait()
            try:
                return store.set_alias(name, "target").name
            except NameConflict:
                return "refused"

        with ThreadPoolExecutor(2) as threads:
            outcomes = [threads.submit(upload), threads.submit(point)]
        assert sorted(outcome.result() == "refused" for outcome in outcomes) == [False, True]
