"""Reading beside the writer, from a folder that may have been damaged."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.errors import DigestMismatch, NotFound
from timbre_store.reader import open_adapter, verify_blob
from timbre_store.store import Store


def modules_after(statement: str) -> set[str]:
    program = f"import sys; sys.path[:] = {sys.path!r}\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_nothing_of_the_store_imports_torch() -> None:
    package = Path(sys.modules["timbre_store"].__path__[0])
    names = sorted(path.stem for path in package.glob("*.py") if path.stem != "__init__")
    modules = modules_after("import " + ", ".join(f"timbre_store.{name}" for name in names))
    assert "timbre_store.store" in modules
    assert modules.isdisjoint({"torch", "safetensors", "timbre_methods", "timbre_server"})


def test_a_reader_needs_no_database() -> None:
    modules = modules_after("from timbre_store.reader import open_adapter, verify_blob")
    assert "timbre_store.reader" in modules
    assert modules.isdisjoint({"sqlalchemy", "sqlite3", "torch", "numpy"})


def test_an_adapter_is_read_while_the_writer_has_the_store_open(store: Store, samples: ModuleType) -> None:
    record = samples.upload(store, "a", 1)
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from pathlib import Path; from timbre_store.reader import open_adapter, verify_blob\n"
        f"files = open_adapter(Path({str(store.root)!r}), {record.digest!r})\n"
        "verify_blob(files.tensors_path, files.manifest.tensors_digest)\n"
        "print(files.config['r'], files.manifest.method)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3 toy\n", "")


@pytest.mark.parametrize(
    "digest", ["", "a", "sha256:" + "0" * 64, "sha256:" + "g" * 64, "../catalogue.sqlite3"]
)
def test_a_digest_that_is_not_stored_is_not_found(store: Store, digest: str) -> None:
    with pytest.raises(NotFound):
        open_adapter(store.root, digest)


def test_a_flipped_bit_is_never_served(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path) as store:
        record = samples.upload(store, "a", 1)
    manifest = record.manifest
    choice = random.Random(7)
    for path in sorted(tmp_path.glob("*/sha256/*/*")):
        good = path.read_bytes()
        path.chmod(0o600)
        for _ in range(70):
            bad = bytearray(good)
            bad[choice.randrange(len(bad))] ^= 1 << choice.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(DigestMismatch):
                verify_blob(open_adapter(tmp_path, record.digest).tensors_path, manifest.tensors_digest)
        path.write_bytes(good)
    assert open_adapter(tmp_path, record.digest).manifest == manifest


def test_tensors_of_another_size_are_refused_without_reading_them(
    tmp_path: Path, samples: ModuleType
) -> None:
    with samples.open_store(tmp_path) as store:
        record = samples.upload(store, "a", 1)
        path = store.blob_path(record.manifest.tensors_digest)
    path.chmod(0o600)
    with path.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match="expected"):
        open_adapter(tmp_path, record.digest)
