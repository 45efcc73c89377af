"""What every test runs under: one thread, no network, no deadline in property tests.

Knows nothing of any room: shared builders live beside the tests that use them.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

# Before torch or a tokenizer is imported anywhere, and inherited by every process that a test starts.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# Triton reads it when it is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class OutsideConnection(RuntimeError):
    """A test tried to reach another machine."""


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine without asking a resolver."""
    if host in {"", "localhost"}:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback or host in {"0.0.0.0", "::"}
    except ValueError:
        return False


def refuse_outside_connections(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: connecting, or looking a name up, succeeds for this machine only."""
    if event == "socket.connect":
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else ""
    elif event == "socket.getaddrinfo":
        host = arguments[0] or ""
    else:
        return
    text = host.decode() if isinstance(host, bytes) else str(host)
    if not is_loopback(text):
        raise OutsideConnection(f"{event} to {text!r}: tests stay on this machine")


@cache
def module_at(path: Path) -> ModuleType:
    """A module by its file."""
    name = "_".join(path.relative_to(Path(__file__).parent).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(f"of_tests_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_module() -> Callable[[Path], ModuleType]:
    """What stands in for an import between tests, whose folders are no packages. Each file is run once."""
    return module_at


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-tables", action="store_true", help="write the tables that are made from the code"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test marked ``gpu`` runs where there is one, one marked ``cpp`` where there is a C++ compiler."""
    if item.get_closest_marker("cpp") is not None:
        from timbre_server.native.library import COMPILERS

        if not any(map(shutil.which, COMPILERS)):
            pytest.skip("no C++ compiler is installed")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")


def pytest_configure(config: pytest.Config) -> None:
    """Install the hook once a process; property tests are bounded by examples, never by time."""
    if not getattr(sys, "_timbre_offline", False):
        sys.addaudithook(refuse_outside_connections)
        sys._timbre_offline = True  # type: ignore[attr-defined]
    hypothesis.settings.register_profile("timbre", deadline=None, max_examples=50)
    hypothesis.settings.load_profile("timbre")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So many in C++, for however little work."""
    from timbre_server.native.library import least_work

    before = torch.get_num_threads()
    monkeypatch.setattr(least_work(), "value", 0)
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
