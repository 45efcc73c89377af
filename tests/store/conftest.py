"""Fixtures of the store's tests: sample adapters, and stores that are checked when the test is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.store import Store


@pytest.fixture(scope="session")
def samples(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """`samples.py` beside this file, which child processes import too."""
    return load_module(Path(__file__).with_name("samples.py"))


@pytest.fixture
def store(tmp_path: Path, samples: ModuleType) -> Iterator[Store]:
    """An empty store, whose integrity is checked after the test."""
    with samples.open_store(tmp_path / "store") as opened:
        yield opened
        assert opened.check_integrity() == ()
        assert list((tmp_path / "store" / "tmp").iterdir()) == []
