"""Imports go one way. The table below is the architecture; whoever adds an edge argues for it here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping

import pytest

# A module belongs to the longest of these names that its own begins with. On the right stand the units it may
# import beside itself. A waist is a unit of its own, so that others can reach it and nothing more.
EDGES: Mapping[str, frozenset[str]] = {
    unit: frozenset(allowed.split())
    for unit, allowed in {
        "timbre_client": "",
        "timbre_store": "",
        "timbre_methods": (
            "timbre_methods.program timbre_methods.routing timbre_methods.prompt_parts"
            " timbre_methods.packed_parts timbre_methods.errors"
        ),
        # The vocabulary of programs, in a few files.
        "timbre_methods.program": (
            "timbre_methods.routing timbre_methods.prompt_parts timbre_methods.sliced_ellpack"
            " timbre_methods.packed_parts timbre_methods.part_values"
        ),
        "timbre_methods.part_values": "",
        "timbre_methods.routing": "timbre_methods.program",
        "timbre_methods.prompt_parts": "",
        "timbre_methods.sliced_ellpack": "",
        "timbre_methods.packed_parts": "",
        "timbre_methods.errors": "",
        "timbre_server": "",
        "timbre_server.errors": "",
        "timbre_server.settings": "",
        "timbre_server.series": "",
        "timbre_server.logs": "",
        # What HTTP tells metrics and logs about a request that ended.
        "timbre_server.request_record": "",
        # What HTTP gets of a recipe before it is registered.
        "timbre_server.made": "timbre_store",
        # The compiled library, and tapes of what it is called with. It knows neither operators nor layers nor
        # attention, which all call it.
        "timbre_server.native": "",
        # The waist between runner, adapters and operators: rows, and nothing about where they came from.
        "timbre_server.operators.row_table": "",
        "timbre_server.adapters.groups": "",
        "timbre_server.operators": (
            "timbre_methods.program timbre_methods.routing timbre_methods.sliced_ellpack"
            " timbre_methods.packed_parts timbre_server.operators.row_table timbre_server.native"
            " timbre_server.errors"
        ),
        "timbre_server.adapters": (
            "timbre_server.operators timbre_server.operators.row_table timbre_server.adapters.groups"
            " timbre_server.native timbre_methods timbre_methods.program timbre_methods.routing"
            " timbre_methods.prompt_parts timbre_methods.sliced_ellpack timbre_methods.packed_parts"
            " timbre_methods.part_values timbre_methods.errors timbre_store timbre_server.errors"
        ),
        # The waist between HTTP and engine: plain messages, and the client that carries them.
        "timbre_server.engine.messages": "timbre_server.engine.pin_messages",
        "timbre_server.engine.pin_messages": "",
        "timbre_server.engine.options": "",
        "timbre_server.engine.client": (
            "timbre_server.engine timbre_server.engine.messages timbre_server.engine.pin_messages"
            " timbre_server.engine.options timbre_server.errors"
        ),
        "timbre_server.engine": (
            "timbre_server.engine.messages timbre_server.engine.pin_messages"
            " timbre_server.engine.options timbre_server.adapters timbre_server.native"
            " timbre_server.operators.row_table timbre_server.adapters.groups"
            " timbre_methods.program timbre_server.errors"
        ),
        # HTTP names the errors of every package, to give each its status in one table.
        "timbre_server.http": (
            "timbre_server.engine.messages timbre_server.engine.pin_messages timbre_server.engine.client"
            " timbre_store timbre_methods.errors timbre_server.request_record timbre_server.made"
            " timbre_server.errors"
        ),
        "timbre_server.metrics_catalogue": "",
        "timbre_server.tally": (
            "timbre_server.engine.messages timbre_server.metrics_catalogue timbre_server.series"
            " timbre_server.request_record"
        ),
        "timbre_server.metrics": (
            "timbre_server.engine.messages timbre_server.metrics_catalogue timbre_server.tally"
        ),
        # What the store asks about an adapter at upload: methods answer, and neither knows the other.
        "timbre_server.inspection": (
            "timbre_server.engine.messages timbre_server.engine.client timbre_methods"
            " timbre_methods.errors timbre_methods.program timbre_store timbre_server.errors"
        ),
        # Merges need both as well, to read adapters and to make one of them.
        "timbre_server.merging": (
            "timbre_methods timbre_methods.errors timbre_store timbre_server.made timbre_server.errors"
        ),
        "timbre_server.model_source": "timbre_server.settings timbre_server.engine",
        "timbre_server.example_adapters": "timbre_store",
        "timbre_server.build": "*",
        # Listens and starts the engine before the heavy `build` is imported.
        "timbre_server.launch": (
            "timbre_server timbre_server.settings timbre_server.logs timbre_server.model_source"
            " timbre_server.http timbre_server.engine.client timbre_server.engine.options timbre_server.build"
            " timbre_server.errors timbre_store"
        ),
        # Another program of the same command, and the file that it runs in a process of its own.
        "timbre_server.convert": "",
        "timbre_server.unpickle": "",
        "timbre_server.cli": (
            "timbre_server.settings timbre_server.launch timbre_server.convert timbre_server.errors"
        ),
        "timbre_server.__main__": "timbre_server.cli",
    }.items()
}

# These run where no tensor belongs: imported alone, they leave torch unloaded.
WITHOUT_TORCH = (
    "timbre_client",
    "timbre_store",
    "timbre_server.adapters.residency",
    "timbre_server.cli",
    "timbre_server.engine.client",
    "timbre_server.engine.kv_blocks",
    "timbre_server.engine.messages",
    "timbre_server.engine.options",
    "timbre_server.engine.policy",
    "timbre_server.engine.scheduler",
    "timbre_server.engine.sequence",
    "timbre_server.engine.wire",
    "timbre_server.launch",
    "timbre_server.metrics",
    "timbre_server.settings",
)

# The engine's side of the socket. The server's process would load the model's libraries by importing it.
ENGINE_PROCESS_ONLY = ("timbre_server.operators", "timbre_server.adapters", "timbre_server.native")


def unit_of(module: str) -> str:
    return max((unit for unit in EDGES if f"{module}.".startswith(f"{unit}.")), key=len)


def imported_names(tree: ast.Module, modules: Mapping[str, ast.Module]) -> set[tuple[int, str]]:
    """(line, dotted name) of each import, also inside functions; `from a import b` is a.b if that is one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(node.lineno, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {(node.lineno, name if name in modules else node.module) for name in full}
    return found


def importers_of(library: str, modules: Mapping[str, ast.Module]) -> set[str]:
    return {
        name
        for name, tree in modules.items()
        if any(imported.split(".")[0] == library for _, imported in imported_names(tree, modules))
    }


def test_imports_between_our_modules_follow_the_table(packages: Mapping[str, ast.Module]) -> None:
    violations = []
    for module, tree in packages.items():
        source = unit_of(module)
        for line, imported in sorted(imported_names(tree, packages)):
            if not imported.startswith("timbre_"):
                continue
            target = unit_of(imported)
            if target != source and "*" not in EDGES[source] and target not in EDGES[source]:
                violations.append(f"{module}:{line} imports {imported} ({source} may not know {target})")
    assert violations == []


def test_every_import_of_ours_names_a_module_that_exists(packages: Mapping[str, ast.Module]) -> None:
    missing = [
        f"{module}:{line} imports {imported}"
        for module, tree in packages.items()
        for line, imported in sorted(imported_names(tree, packages))
        if imported.startswith("timbre_") and imported not in packages
    ]
    assert missing == []


def test_imports_are_absolute(everything: Mapping[str, ast.Module]) -> None:
    relative = [
        f"{module}:{node.lineno}"
        for module, tree in everything.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_this_module_leaves_torch_unloaded(module: str) -> None:
    program = f"import sys, {module}; print(sorted({{'torch', 'transformers'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_nothing_imports_what_reads_pickles(packages: Mapping[str, ast.Module]) -> None:
    reader = "timbre_server.unpickle"
    importers = [
        name for name, tree in packages.items() if reader in {n for _, n in imported_names(tree, packages)}
    ]
    assert (reader in packages, importers) == (True, [])


def test_the_store_knows_no_tensor_library(packages: Mapping[str, ast.Module]) -> None:
    store = {name: tree for name, tree in packages.items() if name.startswith("timbre_store")}
    assert importers_of("torch", store) == set()


def test_only_metrics_knows_prometheus(packages: Mapping[str, ast.Module]) -> None:
    assert importers_of("prometheus_client", packages) <= {"timbre_server.metrics"}


def test_the_engine_knows_no_http_and_no_database(packages: Mapping[str, ast.Module]) -> None:
    below_http = {
        name: tree
        for name, tree in packages.items()
        if name.startswith(("timbre_server.engine", "timbre_server.adapters", "timbre_server.operators"))
    }
    web = ("fastapi", "starlette", "uvicorn", "sqlalchemy", "pydantic")
    assert {library: importers_of(library, below_http) for library in web} == {
        library: set() for library in web
    }


def test_the_engine_s_client_brings_no_tensor_code_into_the_server() -> None:
    program = (
        "import sys, timbre_server.engine.client;"
        f"print([m for m in sys.modules if m.startswith({ENGINE_PROCESS_ONLY!r})])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_only_settings_reads_the_environment(packages: Mapping[str, ast.Module]) -> None:
    readers = [
        f"{module}:{node.lineno}"
        for module, tree in packages.items()
        if module != "timbre_server.settings"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "os"
        and node.attr in {"environ", "environb", "getenv", "putenv"}
    ]
    assert readers == []
