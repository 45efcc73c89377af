"""Fixtures of the store's tests: sample adapters, and stores that are checked when the test is over."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.store import Store


@pytest.fixture(scope="session")
def samples() -> ModuleType:
    """`samples.py` beside this file, which child processes import too."""
    spec = importlib.util.spec_from_file_location("store_samples", Path(__file__).with_name("samples.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path: Path, samples: ModuleType) -> Iterator[Store]:
    """An empty store, whose integrity is checked after the test."""
    with samples.open_store(tmp_path / "store") as opened:
        yield opened
        assert opened.check_integrity() == ()
        assert list((tmp_path / "store" / "tmp").iterdir()) == []
