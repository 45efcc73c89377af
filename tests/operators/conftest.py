"""Tests here import `crowds` from their folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from timbre_methods.program import Part

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def parts(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The makers of random parts."""
    return load_module(Path(__file__).with_name("parts.py"))


@pytest.fixture(scope="session")
def random_part(parts: ModuleType) -> Callable[..., Part]:
    """Draws a part for an operator: ``random_part(operator, in_features, out_features, generator)``."""
    drawn: Callable[..., Part] = parts.random_part
    return drawn
