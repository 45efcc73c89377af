from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from timbre_methods.program import Part


@pytest.fixture(scope="session")
def parts() -> ModuleType:
    """The makers of random parts."""
    spec = importlib.util.spec_from_file_location("operator_parts", Path(__file__).with_name("parts.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def random_part(parts: ModuleType) -> Callable[..., Part]:
    """Draws a part for an operator: ``random_part(operator, in_features, out_features, generator)``."""
    drawn: Callable[..., Part] = parts.random_part
    return drawn
