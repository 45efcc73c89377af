"""Blobs: how they come in, who keeps them, when they go."""

from __future__ import annotations

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.content import ContentFolder, Removed
from timbre_store.errors import BlobTooLarge, DigestMismatch, NotFound
from timbre_store.failpoints import pass_by
from timbre_store.store import Store
from timbre_store.writer import BlobWriter

ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_blob_lies_under_the_sha256_of_its_bytes(store: Store) -> None:
    with store.begin_blob() as writer:
        writer.write(b"a")
        writer.write(bytearray(b"b"))
        writer.write(memoryview(b"xc")[1:])
        assert not store.has_blob(ABC)
        assert writer.commit(expected_digest=ABC) == ABC
    assert writer.size_bytes == 3
    path = store.root / "blobs" / "sha256" / "ba" / ABC.removeprefix("sha256:")
    assert store.blob_path(ABC) == path
    assert path.read_bytes() == b"abc"


def test_folders_and_files_are_the_owner_s_alone(store: Store, samples: ModuleType) -> None:
    samples.upload(store, "a", 1)
    for path in (store.root, *store.root.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path.name


def test_a_writer_that_is_left_without_commit_leaves_nothing(store: Store, samples: ModuleType) -> None:
    with store.begin_blob() as writer:
        writer.write(b"abc")
        assert len(samples.files_of(store.root)) == 1
    assert samples.files_of(store.root) == set()


def test_a_blob_is_cut_off_at_its_limit_while_it_arrives(store: Store, samples: ModuleType) -> None:
    with store.begin_blob(max_bytes=5) as writer:
        writer.write(b"12345")
        with pytest.raises(BlobTooLarge, match="more than 5 bytes"):
            writer.write(b"6")
    assert samples.files_of(store.root) == set()


def test_bytes_that_are_not_the_digest_s_are_refused(store: Store, samples: ModuleType) -> None:
    with store.begin_blob() as writer:
        writer.write(b"abd")
        with pytest.raises(DigestMismatch, match="hash to sha256:a52d159f262b2c6d"):
            writer.commit(expected_digest=ABC)
    assert samples.files_of(store.root) == set()


@pytest.mark.parametrize(
    "text", ["", "abc", ABC.upper(), ABC + "\n", "sha256:../../etc/passwd", "md5:" + "a" * 64]
)
def test_text_that_is_no_digest_names_no_blob(store: Store, text: str) -> None:
    assert not store.has_blob(text)
    with pytest.raises(NotFound, match="is not a digest"):
        store.blob_path(text)


def test_the_same_bytes_from_twenty_threads_are_stored_once(store: Store, samples: ModuleType) -> None:
    content = os.urandom(1 << 18)
    start = threading.Barrier(20)

    def put(_: int) -> str:
        start.wait()
        return str(samples.put(store, content))

    with ThreadPoolExecutor(20) as threads:
        digests = set(threads.map(put, range(20)))
    name = hashlib.sha256(content).hexdigest()
    assert digests == {f"sha256:{name}"}
    assert samples.files_of(store.root) == {f"blobs/{name}"}


def test_an_upload_takes_away_what_no_adapter_took(store: Store, samples: ModuleType) -> None:
    with store.begin_upload() as upload:
        digest = samples.put(upload, b"abc")
        assert store.has_blob(digest)
    assert samples.files_of(store.root) == set()


def test_an_upload_leaves_a_blob_that_was_there_before(store: Store, samples: ModuleType) -> None:
    samples.put(store, b"abc")
    with store.begin_upload() as upload:
        samples.put(upload, b"abc")
    assert store.has_blob(ABC)


def test_an_upload_leaves_a_blob_that_somebody_put_meanwhile(store: Store, samples: ModuleType) -> None:
    with store.begin_upload() as upload:
        samples.put(upload, b"abc")
        samples.put(store, b"abc")
    assert store.has_blob(ABC)


def test_the_last_of_two_uploads_takes_a_shared_blob_away(store: Store, samples: ModuleType) -> None:
    with store.begin_upload() as first:
        samples.put(first, b"abc")
        with store.begin_upload() as second:
            samples.put(second, b"abc")
        assert store.has_blob(ABC)
    assert not store.has_blob(ABC)


def test_a_blob_committed_after_its_upload_was_left_is_taken_away(store: Store, samples: ModuleType) -> None:
    with store.begin_upload() as upload:
        writer = upload.begin_blob()
    writer.write(b"abc")
    assert writer.commit() == ABC
    writer.__exit__(None, None, None)
    assert samples.files_of(store.root) == set()


def test_a_writer_that_was_left_takes_no_more(store: Store, samples: ModuleType) -> None:
    """Threads go on writing while the writer is left: none of their bytes may reach another file."""

    def write_on(writer: BlobWriter, left: threading.Event) -> str:
        try:
            while not left.is_set():
                writer.write(bytes(1 << 16))
            return writer.commit()
        except ValueError:
            return "closed"

    with ThreadPoolExecutor(1) as threads:
        for _ in range(10):
            left = threading.Event()
            with store.begin_blob() as writer:
                writing = threads.submit(write_on, writer, left)
                writer.write(b"first or in between")
            left.set()
            assert writing.result() == "closed"
    assert samples.files_of(store.root) == set()


def test_garbage_is_what_is_old_and_nobody_s(tmp_path: Path, samples: ModuleType) -> None:
    referenced: set[str] = set()
    (tmp_path / "tmp").mkdir()
    folder = ContentFolder(tmp_path / "blobs", tmp_path / "tmp", referenced.intersection, pass_by)
    digests = [samples.put(_Opens(folder), text) for text in (b"a", b"b", b"c")]
    for digest in digests:
        os.utime(folder.path(digest), (1000, 1000))
    referenced.add(digests[0])
    assert folder.collect(min_age_s=60, now_s=1059) == Removed(0, 0)
    with folder.holding(digests[1]):
        assert folder.collect(min_age_s=60, now_s=1060) == Removed(1, 1)
    assert list(folder.digests()) == sorted(digests[:2])
    assert folder.collect(min_age_s=60, now_s=1060) == Removed(1, 1)
    assert list(folder.digests()) == digests[:1]


def test_bytes_uploaded_again_are_as_young_as_new_ones(store: Store, samples: ModuleType) -> None:
    samples.put(store, b"abc")
    os.utime(store.blob_path(ABC), (1000, 1000))
    samples.put(store, b"abc")
    assert store.collect_garbage(min_age_s=3600) == Removed(0, 0)
    assert store.has_blob(ABC)


def test_a_damaged_blob_heals_when_its_bytes_are_uploaded_again(store: Store, samples: ModuleType) -> None:
    path = store.blob_path(samples.put(store, b"abc"))
    path.chmod(0o600)
    path.write_bytes(b"abd")
    assert store.check_integrity() == (f"blobs: the file {path.name} does not hold the bytes of its name",)
    samples.put(store, b"abc")
    assert path.read_bytes() == b"abc"


class _Opens:
    """A folder seen as something that opens blobs."""

    def __init__(self, folder: ContentFolder) -> None:
        self.begin_blob = lambda: folder.begin(1 << 20)
