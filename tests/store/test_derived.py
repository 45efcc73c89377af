"""What registration adds to an adapter's tensors is stored with it, hashed like everything, and read back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from timbre_store.errors import DigestMismatch, InvalidAdapter, NotFound
from timbre_store.inspection import Inspection
from timbre_store.limits import StoreLimits
from timbre_store.reader import open_adapter, verify_blob
from timbre_store.store import Store

DERIVED = b"singular vectors"


def inspect(config: dict[str, Any], header: object, tensors_path: Path, derived_path: Path) -> Inspection:
    if not derived_path.exists():
        derived_path.write_bytes(DERIVED + os.urandom(2))
    if config.get("refuse"):
        raise InvalidAdapter("refused after deriving")
    return Inspection("toy", ("layers.0.q_proj",), 12, 48)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path, inspect=inspect, limits=StoreLimits()) as opened:
        yield opened
        assert opened.check_integrity() == ()
        assert list((tmp_path / "tmp").iterdir()) == []


def blobs(store: Store) -> int:
    return len(list((store.root / "blobs").glob("sha256/*/*")))


def test_derived_tensors_are_a_third_blob(store: Store, samples: ModuleType) -> None:
    record = samples.upload(store, "a", 1)
    files = open_adapter(store.root, record.digest)
    assert files.derived_path is not None
    assert files.derived_path.read_bytes().startswith(DERIVED)
    verify_blob(files.derived_path, record.manifest.derived_digest)
    assert b"derived_digest" in record.manifest.to_bytes()
    assert blobs(store) == 3


def test_equal_adapters_share_it_and_the_last_one_takes_it_away(store: Store, samples: ModuleType) -> None:
    """Equal files on one base are one adapter: nothing is derived again, lest it come out otherwise."""
    first, second = samples.upload(store, "a", 1), samples.upload(store, "b", 1)
    assert first.digest == second.digest
    assert samples.upload(store, "a", 1).version == 1
    other = samples.upload(store, "c", 2)
    assert other.manifest.derived_digest != first.manifest.derived_digest
    assert blobs(store) == 6
    store.delete("a")
    assert store.collect_garbage(0).files == 0
    assert open_adapter(store.root, second.digest).derived_path is not None
    store.delete("b")
    store.delete("c")
    store.collect_garbage(0)
    assert blobs(store) == 0


def test_a_refusal_leaves_no_derived_tensors(store: Store, samples: ModuleType) -> None:
    config, tensors = samples.adapter(1)
    with pytest.raises(InvalidAdapter, match="after deriving"):
        samples.upload_files(store, "a", config[:-1] + b', "refuse": true}', tensors)
    assert blobs(store) == 0


def test_lost_or_damaged_derived_tensors_are_found(tmp_path: Path, samples: ModuleType) -> None:
    with Store(tmp_path, inspect=inspect, limits=StoreLimits()) as store:
        record = samples.upload(store, "a", 1)
        path = store.blob_path(record.manifest.derived_digest)
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(DigestMismatch):
            verify_blob(path, record.manifest.derived_digest)
        assert len(store.check_integrity()) == 1
        path.unlink()
        with pytest.raises(NotFound, match=r"derived tensors .* upload the adapter again"):
            open_adapter(tmp_path, record.digest)


@pytest.mark.parametrize("damage", ["damaged", "lost"])
def test_what_is_no_longer_what_was_derived_is_derived_anew(
    store: Store, samples: ModuleType, damage: str
) -> None:
    record = samples.upload(store, "a", 1)
    path = store.blob_path(record.manifest.derived_digest)
    sound = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(sound[::-1])
    if damage == "lost":
        path.unlink()
    again = samples.upload(store, "b", 1)
    assert store.blob_path(again.manifest.derived_digest).read_bytes().startswith(DERIVED)
    path.unlink(missing_ok=True)
    path.write_bytes(sound)


def test_what_a_method_derives_otherwise_by_now_is_derived_anew(tmp_path: Path, samples: ModuleType) -> None:
    with Store(tmp_path, inspect=inspect, limits=StoreLimits()) as store:
        first = samples.upload(store, "a", 1)
    changed = {"toy": 2, "other": 3}
    with Store(tmp_path, inspect=inspect, limits=StoreLimits(), derivations=changed) as store:
        second = samples.upload(store, "a", 1)
        assert (second.version, second.manifest.derivation) == (2, 2)
        assert second.manifest.derived_digest != first.manifest.derived_digest
        assert samples.upload(store, "b", 1).digest == second.digest, "the second is taken, and not the first"
        assert open_adapter(store.root, first.digest).derived_path is not None
    assert b'"derivation":2,' in second.manifest.to_bytes()
    assert b'"derivation"' not in first.manifest.to_bytes()
