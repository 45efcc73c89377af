from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def twins(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """What holds a kernel's operator against its twin."""
    return load_module(Path(__file__).with_name("twins.py"))
