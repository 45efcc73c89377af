"""A disk that is full refuses uploads, loses nothing, and takes them again when there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHILD = Path(__file__).with_name("full_disk_child.py")


def run_child(kind: str, root: Path) -> str:
    paths = ":".join(path for path in sys.path if path)
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILD), kind, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB in memory."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs privileges; the file size limit is tested instead")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_file_system_is_survived(small_disk: Path) -> None:
    assert run_child("tmpfs", small_disk / "store") == "True 0 True () 1 ()\n"


def test_a_refused_write_is_survived(tmp_path: Path) -> None:
    assert run_child("rlimit", tmp_path / "store") == "False 0 True () 1 ()\n"
