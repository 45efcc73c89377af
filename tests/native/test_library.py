"""The C++ library: where it comes from, and what is said where there can be none."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from timbre_server.adapters.kernels import choose_kernels
from timbre_server.native import library as native
from timbre_server.operators.catalogue import why_not


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home of nobody's yet, with a library that is looked for anew."""
    monkeypatch.setenv("HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that the library is compiled from: one small file."""
    folder = tmp_path / "source"
    folder.mkdir()
    monkeypatch.setattr(native, "SOURCES", folder)
    written = folder / "kernels.cpp"
    written.write_text('extern "C" int answer() { return 1; }')
    return written


def test_no_two_sources_have_a_type_of_one_name() -> None:
    """The linker would take what is inline in one for the other's."""
    defined = re.compile(
        r"^(?:template <[^<>]*> )?(?:struct|class)(?: alignas\(\w+\))? (\w+) (?:final )?\{", re.M
    )
    names = Counter(name for path in native.SOURCES.iterdir() for name in defined.findall(path.read_text()))
    assert {"Uses", "Slices"} <= set(names)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.cpp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="of that family of processors")
@pytest.mark.parametrize("source", sorted(native.SOURCES.glob("*.cpp")), ids=lambda source: source.stem)
def test_sources_compile_for_a_processor_without_wide_registers(source: Path) -> None:
    compiler = next(filter(shutil.which, native.COMPILERS))
    options = ["-std=c++17", "-O1", "-march=x86-64", "-fPIC", "-c", "-o", "/dev/null"]
    subprocess.run([compiler, *options, str(source)], check=True)


@pytest.mark.cpp
def test_it_is_built_once_and_then_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not("native") is None
    (built,) = (home / ".cache" / "timbre").iterdir()

    def never(*_: object) -> None:
        raise AssertionError("it was built again")

    monkeypatch.setattr(native, "_build", never)
    native.library.cache_clear()
    native.library()
    assert list((home / ".cache" / "timbre").iterdir()) == [built]


@pytest.mark.cpp
def test_a_cache_that_others_can_write_to_is_not_used(home: Path) -> None:
    folder = home / ".cache" / "timbre"
    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRWXU | stat.S_IRWXO)
    assert why_not("native") is None
    assert not list(folder.iterdir())


@pytest.mark.cpp
def test_a_cache_in_a_folder_that_others_can_write_to_is_not_used(home: Path) -> None:
    folder = home / ".cache" / "timbre"
    folder.mkdir(parents=True)
    folder.parent.chmod(stat.S_IRWXU | stat.S_IRWXO)
    assert why_not("native") is None
    assert not list(folder.iterdir())


@pytest.mark.cpp
def test_a_library_that_was_not_written_to_its_end_is_built_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_fingerprint", lambda *_: "torn")
    built = home / ".cache" / "timbre" / "kernels-torn.so"
    built.parent.mkdir(parents=True)
    built.touch()
    assert why_not("native") is None
    assert built.stat().st_size


@pytest.mark.cpp
def test_a_new_library_drives_out_those_that_were_not_used_for_long(home: Path, source: Path) -> None:
    loaded = native.library()
    folder = home / ".cache" / "timbre"
    (old,) = folder.iterdir()
    recent, foreign = folder / "kernels-recent.so", folder / "other.so"
    (folder / "kernels-gone.so").symlink_to(folder / "nowhere")  # As if another process had removed it.
    killed, building = folder / "building-old", folder / "building-new"
    for build in (killed, building):
        build.mkdir()
        (build / "linear.o").touch()
    for path, age_days in ((old, 31), (recent, 29), (foreign, 31), (killed, 31), (building, 1)):
        path.touch()
        os.utime(path, (time.time() - age_days * 86_400,) * 2)

    source.write_text('extern "C" int answer() { return 2; }')
    native.library.cache_clear()
    new = native.library()
    assert (loaded.answer(), new.answer()) == (1, 2)
    assert {recent, foreign, building} < set(folder.iterdir())
    assert not old.exists()
    assert not killed.exists()


@pytest.mark.cpp
def test_a_library_that_is_used_is_not_an_old_one(home: Path, source: Path) -> None:
    native.library()
    (built,) = (home / ".cache" / "timbre").iterdir()
    os.utime(built, (0, 0))
    native.library.cache_clear()
    native.library()
    assert time.time() - built.stat().st_mtime < 60


@pytest.mark.cpp
def test_a_compiler_that_fails_is_told_with_its_last_words(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_FLAGS", ("-no-such-flag",))
    reason = why_not("native")
    assert reason is not None
    assert "could not be built" in reason
    assert "no-such-flag" in reason
    assert not list((home / ".cache" / "timbre").iterdir())


def test_without_a_compiler_pytorch_serves_and_the_reason_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    kernels, reason = choose_kernels("auto", torch.device("cpu"))
    assert kernels == "torch"
    assert reason == "no C++ compiler was found; install one of no-such-compiler"
