"""Registering, refusing, opening, and the upkeep of a store."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from sqlalchemy import Engine, event

from timbre_store.content import Removed
from timbre_store.errors import (
    DigestMismatch,
    InvalidAdapter,
    InvalidName,
    NotFound,
    StoreError,
    StoreUnavailable,
    UnexpectedTensor,
    UnsafeFile,
)
from timbre_store.inspection import Inspection
from timbre_store.limits import StoreLimits
from timbre_store.manifest import Manifest
from timbre_store.reader import open_adapter, verify_blob
from timbre_store.safetensors_header import TensorHeader
from timbre_store.store import Store
from timbre_store.upload import Arrival

NAN = np.array([np.nan] * 12, "<f4").tobytes()


def test_an_adapter_is_what_its_files_and_its_method_say(store: Store, samples: ModuleType) -> None:
    config, tensors = samples.adapter(1)
    record = samples.upload(store, "a", 1)
    assert record.manifest == Manifest(
        method="toy",
        peft_type="LORA",
        base_model_digest="sha256:" + "b" * 64,
        sites=("layers.0.q_proj",),
        parameters=12,
        stored_bytes=len(config) + len(tensors),
        prepared_bytes=48,
        config_digest=samples.put(store, config),
        tensors_digest=samples.put(store, tensors),
    )
    files = open_adapter(store.root, record.digest)
    assert files.manifest == record.manifest
    assert files.config == {"peft_type": "LORA", "r": 3}
    assert files.tensors_path.read_bytes() == tensors
    verify_blob(files.tensors_path, record.manifest.tensors_digest)


def test_blobs_that_were_put_before_make_an_adapter_by_digest(store: Store, samples: ModuleType) -> None:
    config, tensors = (samples.put(store, content) for content in samples.adapter(1))
    assert store.register("a", config, tensors, samples.BASE) == store.resolve("a")
    assert store.get("a").manifest.tensors_digest == tensors


REFUSED: dict[str, tuple[bytes, Callable[[bytes], bytes], str]] = {
    "a config that is no object": (b"[]", bytes, "expected an object"),
    "a config with a key twice": (b'{"r":1,"r":2}', bytes, "stands twice"),
    "a config above a mebibyte": (b"{" + b" " * (1 << 20) + b"}", bytes, "more than 1048576 bytes"),
    "a config nested deep": (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", bytes, "at most 32 levels"),
    "a config with NaN": (b'{"alpha":NaN}', bytes, "NaN is not a JSON number"),
    "a peft_type that is a number": (b'{"peft_type":3}', bytes, "expected a short string"),
    "a config that the method refuses": (
        b'{"refuse":"r is 0; expected 1 or more"}',
        bytes,
        "^r is 0; expected",
    ),
    "tensors that are cut off": (b"{}", lambda tensors: tensors[:-1], "the tensors end at"),
    "tensors with NaN": (b"{}", lambda tensors: tensors[:-48] + NAN, "NaN or infinity at element 0"),
    "no tensors": (b"{}", lambda tensors: b"", "0 bytes"),
}


@pytest.mark.parametrize(("config", "change", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_refused_upload_leaves_nothing(
    store: Store, samples: ModuleType, config: bytes, change: Callable[[bytes], bytes], reason: str
) -> None:
    samples.upload(store, "kept", 1)
    before = samples.files_of(store.root)
    with pytest.raises(InvalidAdapter, match=reason):
        samples.upload_files(store, "a", config, change(samples.adapter(1)[1]))
    assert samples.files_of(store.root) == before
    assert [record.name for record in store.list(limit=9).items] == ["kept"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a@1", "x" * 97])
def test_an_upload_under_a_bad_name_leaves_nothing(store: Store, samples: ModuleType, name: str) -> None:
    with pytest.raises(InvalidName):
        samples.upload(store, name, 1)
    assert samples.files_of(store.root) == set()


def test_an_upload_under_an_alias_leaves_nothing(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    store.set_alias("prod", "a")
    before = samples.files_of(store.root)
    with pytest.raises(StoreError):
        samples.upload(store, "prod", 2)
    assert samples.files_of(store.root) == before


def test_a_refusal_by_digest_keeps_the_blobs_for_another_try(store: Store, samples: ModuleType) -> None:
    config, tensors = samples.put(store, b"[]"), samples.put(store, samples.adapter(1)[1])
    with pytest.raises(UnsafeFile):
        store.register("a", config, tensors, None)
    assert store.has_blob(config)
    assert store.register("a", samples.put(store, b"{}"), tensors, None).version == 1


def test_absent_blobs_are_named(store: Store, samples: ModuleType) -> None:
    config, absent = samples.put(store, b"{}"), "sha256:" + "0" * 64
    with pytest.raises(NotFound, match=f"no blob {absent}"):
        store.register("a", config, absent, None)
    with pytest.raises(NotFound, match="is not a digest"):
        store.register("a", "../config", absent, None)


def test_a_refusal_in_the_store_s_own_words_passes_through(tmp_path: Path, samples: ModuleType) -> None:
    def refuse(*_: object) -> Inspection:
        raise UnexpectedTensor("tensor 'w' belongs to no site")

    with Store(tmp_path, inspect=refuse, limits=StoreLimits()) as store:
        with pytest.raises(UnexpectedTensor, match="belongs to no site"):
            samples.upload(store, "a", 1)
        assert samples.files_of(tmp_path) == set()


def test_a_bug_in_a_method_is_not_taken_for_a_bad_adapter(tmp_path: Path, samples: ModuleType) -> None:
    def fail(*_: object) -> Inspection:
        raise ZeroDivisionError

    with Store(tmp_path, inspect=fail, limits=StoreLimits()) as store:
        with pytest.raises(ZeroDivisionError):
            samples.upload(store, "a", 1)
        assert samples.files_of(tmp_path) == set()


def test_a_blob_damaged_on_disk_makes_no_adapter(store: Store, samples: ModuleType) -> None:
    config, tensors = (samples.put(store, content) for content in samples.adapter(1))
    path = store.blob_path(tensors)
    good = path.read_bytes()
    path.chmod(0o600)
    path.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(DigestMismatch):
        store.register("a", config, tensors, None)
    path.write_bytes(good)
    assert store.register("a", config, tensors, None).version == 1


def test_deleted_files_stay_for_requests_in_flight_until_they_are_garbage(
    store: Store, samples: ModuleType
) -> None:
    record = samples.upload(store, "a", 1)
    kept = samples.upload(store, "b", 4)  # the same config, other tensors
    for path in store.root.glob("*/sha256/*/*"):
        os.utime(path, (1000, 1000))
    store.delete("a")
    assert store.collect_garbage(min_age_s=3600) == Removed(0, 0)
    assert open_adapter(store.root, record.digest).manifest == record.manifest
    sizes = len(record.manifest.to_bytes()) + len(samples.adapter(1)[1])
    assert store.collect_garbage(min_age_s=0) == Removed(2, sizes)
    with pytest.raises(NotFound):
        open_adapter(store.root, record.digest)
    assert open_adapter(store.root, kept.digest).manifest == kept.manifest


def test_garbage_collection_never_takes_what_an_upload_is_about_to_name(
    store: Store, samples: ModuleType
) -> None:
    done = threading.Event()

    def collect() -> int:
        rounds = 0
        while not done.is_set() or rounds == 0:
            store.collect_garbage(min_age_s=0)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(5) as threads:
        collecting = threads.submit(collect)
        uploads = [threads.submit(samples.upload, store, f"a{i % 4}", i) for i in range(40)]
        try:
            records = [upload.result() for upload in uploads]
        finally:
            done.set()
        assert collecting.result() > 0
    for record in records:
        assert open_adapter(store.root, record.digest).manifest == record.manifest


def test_what_was_stored_is_there_after_reopening(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path) as store:
        record = samples.upload(store, "a", 1)
        store.set_alias("prod", "a@1")
    with samples.open_store(tmp_path) as store:
        assert store.resolve("prod") == record
        assert store.check_integrity() == ()


def test_leftovers_of_a_crash_are_gone_after_opening(tmp_path: Path, samples: ModuleType) -> None:
    samples.open_store(tmp_path).close()
    (tmp_path / "tmp" / "leftover").write_bytes(b"half a blob")
    samples.open_store(tmp_path).close()
    assert samples.files_of(tmp_path) == set()


def test_a_store_has_one_writer(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path), pytest.raises(StoreUnavailable, match="open in another process"):
        samples.open_store(tmp_path)
    samples.open_store(tmp_path).close()


def test_an_adapter_of_many_tensors_is_taken(store: Store, samples: ModuleType) -> None:
    """DoRA on 7 sites of 32 layers."""
    tensors = {
        f"base_model.model.model.layers.{layer}.self_attn.s{site}.lora_{part}.weight": (
            "BF16",
            [1, 2],
            bytes(4),
        )
        for layer in range(32)
        for site in range(7)
        for part in ("A", "B", "magnitude_vector")
    }
    config = json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}).encode()
    record = samples.upload_files(store, "dora", config, samples.tensor_file(tensors))
    assert record.manifest.parameters == 2 * 672


def test_equal_contents_that_come_together_are_examined_once(tmp_path: Path, samples: ModuleType) -> None:
    examined: list[Path] = []

    def inspect(config: dict[str, Any], header: TensorHeader, tensors: Path, derived: Path) -> Inspection:
        examined.append(tensors)
        found: Inspection = samples.inspect(config, header, tensors, derived)
        return found

    with Store(tmp_path, inspect=inspect, limits=StoreLimits()) as store:
        with store.begin_upload() as upload:
            pairs = [
                tuple(samples.put(upload, content) for content in samples.adapter(seed)) for seed in (1, 2)
            ]
            arrivals = [Arrival(f"a{number}", *pairs[number % 2]) for number in range(6)]
            records = store.register_all(arrivals, samples.BASE)
        assert len(examined) == 2
        assert [record.name for record in records] == [f"a{number}" for number in range(6)]
        assert [record.digest for record in records] == [records[0].digest, records[1].digest] * 3
        assert all(store.resolve(record.name) == record for record in records)
        assert store.check_integrity() == ()


def test_a_deletion_looks_at_its_own_adapter_alone(store: Store, samples: ModuleType) -> None:
    """In a catalogue of any size: the plan of no query that it runs walks a table."""
    for seed in range(3):
        samples.upload(store, f"a{seed}", seed)
    walks: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, given: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "DELETE", "INSERT")):
            plan = connection.connection.driver_connection.execute(f"EXPLAIN QUERY PLAN {statement}", given)
            walks.extend(row[3] for row in plan if row[3].startswith("SCAN") and "CONSTANT" not in row[3])

    event.listen(Engine, "before_cursor_execute", explain)
    try:
        store.delete("a1")
    finally:
        event.remove(Engine, "before_cursor_execute", explain)
    assert walks == []
