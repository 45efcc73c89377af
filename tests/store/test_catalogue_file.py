"""What a store finds on the disk when it opens: another version, another program's, damaged, lost."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.errors import StoreUnavailable
from timbre_store.recipe import Parent, Recipe


def test_a_catalogue_of_another_schema_version_is_refused(tmp_path: Path, samples: ModuleType) -> None:
    samples.open_store(tmp_path).close()
    catalogue = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    catalogue.execute("PRAGMA user_version = 7")
    catalogue.close()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="schema version 7; this version reads 3"):
            samples.open_store(tmp_path)


def test_a_catalogue_of_the_first_schema_version_is_brought_up_to_date(
    tmp_path: Path, samples: ModuleType
) -> None:
    with samples.open_store(tmp_path) as store:
        before = samples.upload(store, "a", 1)
    catalogue = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    catalogue.execute("DROP TABLE mixes")
    catalogue.execute("DROP INDEX ix_manifests_derived_digest")
    catalogue.execute("ALTER TABLE manifests DROP COLUMN derived_digest")
    catalogue.execute("PRAGMA user_version = 1")
    catalogue.close()
    for seed in (2, 3):
        with samples.open_store(tmp_path) as store:
            assert store.get("a") == before
            samples.upload(store, "b", seed)
            store.collect_garbage(0)
            assert store.check_integrity() == ()


def test_a_catalogue_of_the_second_schema_version_learns_of_mixes(
    tmp_path: Path, samples: ModuleType
) -> None:
    with samples.open_store(tmp_path) as store:
        before = samples.upload(store, "a", 1)
    catalogue = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    catalogue.execute("DROP TABLE mixes")
    catalogue.execute("PRAGMA user_version = 2")
    catalogue.close()
    for name in ("b", "c"):
        with samples.open_store(tmp_path) as store:
            assert store.get("a") == before
            recipe = Recipe("linear", (Parent(before.digest, 0.5),))
            assert store.register_mix(name, recipe, samples.BASE).parts[0].adapter == before
            assert store.check_integrity() == ()


def test_another_program_s_database_is_refused(tmp_path: Path, samples: ModuleType) -> None:
    foreign = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    foreign.execute("CREATE TABLE recipes (name TEXT)")
    foreign.close()
    with pytest.raises(StoreUnavailable, match="another program's database"):
        samples.open_store(tmp_path)


@pytest.mark.parametrize("kept_bytes", [0, 100, 5000])
def test_a_catalogue_cut_short_is_refused(tmp_path: Path, samples: ModuleType, kept_bytes: int) -> None:
    with samples.open_store(tmp_path) as store:
        samples.upload(store, "a", 1)
    before = samples.files_of(tmp_path)
    with (tmp_path / "catalogue.sqlite3").open("r+b") as catalogue:
        catalogue.truncate(kept_bytes)
    with pytest.raises(StoreUnavailable, match=r"restore (it|catalogue\.sqlite3) from a backup"):
        samples.open_store(tmp_path)
    assert samples.files_of(tmp_path) == before


def test_a_lost_catalogue_is_not_taken_for_a_new_store(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path) as store:
        samples.upload(store, "a", 1)
    for path in tmp_path.glob("catalogue.sqlite3*"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="files but an empty catalogue"):
            samples.open_store(tmp_path)


def test_integrity_names_what_is_missing_or_changed(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path) as store:
        record = samples.upload(store, "a", 1)
        assert store.check_integrity() == ()
        path = store.blob_path(record.manifest.tensors_digest)
        shutil.move(path, tmp_path / "aside")
        assert store.check_integrity() == (
            f"the tensors of {record.digest} are not in the store; upload the adapter again",
        )
        shutil.move(tmp_path / "aside", path)
        assert store.check_integrity() == ()
