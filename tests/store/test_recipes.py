"""Adapters made of others: mixes, which stand on them, and adapters that came together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.errors import AdapterInUse, InvalidAdapter, InvalidName, NameConflict, NotFound
from timbre_store.manifest import Manifest
from timbre_store.mix import mix_manifest
from timbre_store.recipe import Parent, Recipe
from timbre_store.store import Store
from timbre_store.upload import Arrival


@pytest.fixture
def store(tmp_path: Path, samples: ModuleType) -> Iterator[Store]:
    with samples.open_store(tmp_path) as opened:
        yield opened
        assert opened.check_integrity() == ()


def mix_of(*parents: tuple[str, float]) -> Recipe:
    return Recipe("linear", tuple(Parent(digest, weight) for digest, weight in parents))


def test_a_mix_is_a_version_like_any_other_and_resolves_to_its_parts(
    store: Store, samples: ModuleType
) -> None:
    one, other = samples.upload(store, "one", 1), samples.upload(store, "other", 2)
    recipe = mix_of((one.digest, 0.7), (other.digest, -0.3))
    mix = store.register_mix("both", recipe, samples.BASE)
    assert (mix.name, mix.version, mix.manifest.method, mix.manifest.recipe) == ("both", 1, "mix", recipe)
    assert [(part.adapter, part.weight) for part in mix.parts] == [(one, 0.7), (other, -0.3)]
    assert mix.manifest.prepared_bytes == one.manifest.prepared_bytes + other.manifest.prepared_bytes
    assert store.register_mix("both", recipe, samples.BASE) == mix
    again = store.register_mix("both", mix_of((one.digest, 0.5)), samples.BASE)
    assert (again.version, again.digest == mix.digest) == (2, False)
    assert store.resolve("both@1") == mix
    store.set_alias("prod", "both@1")
    assert store.resolve("prod").parts == mix.parts
    assert [item.name for item in store.list(10).items] == ["both", "one", "other"]


def test_a_mix_takes_the_virtual_tokens_and_the_copies_of_rows_of_all_its_parts() -> None:
    parts = [
        Manifest(
            "lora", "LORA", None, sites, 2, 3, 5, digest, digest, virtual_tokens=tokens, row_copies=copies
        )
        for sites, digest, tokens, copies in (
            (("q", "k"), "sha256:" + "1" * 64, 7, 3),
            (("k",), "sha256:" + "2" * 64, 0, 1),
            (("k", "v"), "sha256:" + "3" * 64, 4, 2),
        )
    ]
    mix = mix_manifest(mix_of(*((part.digest, 0.5) for part in parts)), parts, None)
    assert (mix.virtual_tokens, mix.row_copies) == (11, 6)
    assert (mix.sites, mix.parameters, mix.prepared_bytes) == (("q", "k", "v"), 6, 15)


def test_what_a_mix_stands_on_stays_as_long_as_it_does(store: Store, samples: ModuleType) -> None:
    one, other = samples.upload(store, "one", 1), samples.upload(store, "other", 2)
    mix = store.register_mix("both", mix_of((one.digest, 0.7), (other.digest, 0.3)), samples.BASE)
    for name in ("one", "other@1"):
        with pytest.raises(AdapterInUse, match="both@1"):
            store.delete(name)
    samples.upload(store, "same", 1)
    assert store.delete("one") == ()
    assert store.resolve("both").parts[0].adapter.name == "same"
    with pytest.raises(AdapterInUse, match="both@1"):
        store.delete("same")
    assert store.delete("both") == (mix.digest,)
    assert store.delete("same") == (one.digest,)
    store.collect_garbage(0)
    assert store.resolve("other").digest == other.digest


def test_a_name_goes_together_with_the_mix_of_its_own_versions(store: Store, samples: ModuleType) -> None:
    orders = set()
    for seed in range(1, 9):  # Whichever of the two digests comes first.
        first = samples.upload(store, "a", seed)
        mix = store.register_mix("a", mix_of((first.digest, 0.5)), samples.BASE)
        assert (mix.version, mix.parts[0].adapter) == (first.version + 1, first)
        orders.add(first.digest < mix.digest)
        assert set(store.delete("a")) == {first.digest, mix.digest}
    assert orders == {True, False}


def test_a_mix_of_what_is_not_there_stores_nothing(store: Store, samples: ModuleType, tmp_path: Path) -> None:
    gone, kept = samples.upload(store, "gone", 1), samples.upload(store, "kept", 2)
    store.set_alias("alias", "kept")
    store.delete("gone")
    before = samples.files_of(tmp_path)
    with pytest.raises(NotFound, match=gone.digest):
        store.register_mix("both", mix_of((kept.digest, 1.0), (gone.digest, 1.0)), samples.BASE)
    with pytest.raises(NameConflict):
        store.register_mix("alias", mix_of((kept.digest, 1.0)), samples.BASE)
    with pytest.raises(InvalidName):
        store.register_mix("no name", mix_of((kept.digest, 1.0)), samples.BASE)
    assert samples.files_of(tmp_path) == before
    store.collect_garbage(0)
    with pytest.raises(NotFound, match=gone.digest):
        store.register_mix("both", mix_of((gone.digest, 1.0)), samples.BASE)


def test_adapters_that_come_together_are_all_stored_or_none(
    store: Store, samples: ModuleType, tmp_path: Path
) -> None:
    recipe = Recipe("ties", (Parent(samples.BASE, 1.0),), rank=2, density=0.5)
    store.set_alias("taken", samples.upload(store, "a", 1).name)
    before = samples.files_of(tmp_path)

    def arrivals(*names: str, config: bytes = b"{}") -> list[Arrival]:
        tensors = [samples.put(together, samples.adapter(seed)[1]) for seed, _ in enumerate(names, 5)]
        configs = [samples.put(together, content) for content in (b"{}", config)]
        return [Arrival(*each, recipe) for each in zip(names, configs, tensors, strict=True)]

    with store.begin_upload() as together, pytest.raises(NameConflict):
        store.register_all(arrivals("b", "taken"), None)
    with store.begin_upload() as together, pytest.raises(InvalidAdapter, match="no good"):
        store.register_all(arrivals("b", "c", config=b'{"refuse": "no good"}'), None)
    assert samples.files_of(tmp_path) == before
    assert store.versions("b") == ()
    with store.begin_upload() as together:
        records = store.register_all(arrivals("b", "c"), None)
    assert [(each.name, each.version) for each in records] == [("b", 1), ("c", 1)]
    assert records[0] == store.resolve("b")
    assert {each.manifest.recipe for each in records} == {recipe}
