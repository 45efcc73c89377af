"""The source tree as `ast`, read once: what the architecture tests walk."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE_ROOTS = ("server", "adapters_store", "clients/python")
OTHER_ROOTS = ("tests", "examples")


def parse(paths: list[Path], root: Path) -> dict[str, ast.Module]:
    trees = {}
    for path in sorted(paths):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return trees


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def packages() -> Mapping[str, ast.Module]:
    """Every module of the four import packages, by dotted name."""
    trees: dict[str, ast.Module] = {}
    for folder in PACKAGE_ROOTS:
        root = REPOSITORY / folder
        trees.update(parse(list(root.glob("timbre_*/**/*.py")), root))
    return trees


@pytest.fixture(scope="session")
def everything(packages: Mapping[str, ast.Module]) -> Mapping[str, ast.Module]:
    """The packages, and tests and examples by dotted path from the repository's root."""
    trees = dict(packages)
    for folder in OTHER_ROOTS:
        trees.update(parse(list((REPOSITORY / folder).rglob("*.py")), REPOSITORY))
    return trees


@pytest.fixture(scope="session")
def tracked_text() -> Mapping[str, str]:
    """Every file that is or would be committed, by path, if it is text."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
    )
    texts = {}
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = REPOSITORY / name
        content = path.read_bytes() if path.is_file() else b"\0"
        if b"\0" not in content[:8192]:
            texts[name] = content.decode("utf-8", errors="replace")
    return texts
