"""What the code never does: vague names, broad handlers, pickles, globals, tests that cannot fail."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

VAGUE_CLASS = re.compile(r"Manager|Helper|Handler|Util|^_?Base(?=[A-Z]|$)")
VAGUE_MODULE = re.compile(r"(^|_)(utils?|helpers?|misc|common|stuff|base)$")
VAGUE_FUNCTION = re.compile(r"^_?(process|handle)_")

# Where everything may be caught and not raised again, and why: it ends the request or the load it stands for.
BROAD_HANDLERS: Mapping[str, str] = {
    "timbre_server.engine.core:EngineCore._execute": "the engine loop: logged, ends the step's requests",
    "timbre_server.engine.worker:run_worker": "the end of the engine process: logged, told to the server",
    "timbre_server.http.errors:ErrorBoundary.__call__": "the request boundary: logged, answered with 500",
    "timbre_server.http.sse:encoded": "the request boundary after the status: logged, told in the stream",
    "timbre_server.unpickle:main": "the end of a process that reads a hostile file: told to its parent",
}

# These can run code from a file.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "numpy.load", "np.load", "yaml.load", "eval", "exec", "compile"}

# Where one of them is called all the same, and what keeps the file's code from running.
CAGED_CALLS: Mapping[str, str] = {
    "timbre_server.unpickle:read": "weights_only=True, in a process of its own under limits",
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def scopes(tree: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """(qualified name of the enclosing function or class, node) for every node below `tree`."""
    for node in ast.iter_child_nodes(tree):
        yield name, node
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        separator = "." if ":" in name else ":"
        yield from scopes(node, f"{name}{separator}{node.name}" if named else name)  # type: ignore[attr-defined]


def nodes_of(modules: Mapping[str, ast.Module]) -> Iterator[tuple[str, str, ast.AST]]:
    for module, tree in modules.items():
        for scope, node in scopes(tree, module):
            yield module, scope, node


def is_broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or dotted(handler.type) in {"Exception", "BaseException"}


def cleans_up_and_passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends by raising what it caught: then it hides nothing."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def test_names_say_what_a_thing_is(packages: Mapping[str, ast.Module]) -> None:
    vague = [name for name in packages if VAGUE_MODULE.search(name.split(".")[-1])]
    for module, _, node in nodes_of(packages):
        if isinstance(node, ast.ClassDef) and VAGUE_CLASS.search(node.name):
            vague.append(f"{module}:{node.lineno} class {node.name}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and VAGUE_FUNCTION.search(node.name):
            vague.append(f"{module}:{node.lineno} def {node.name}")
    assert vague == []


def test_modules_say_what_they_are(packages: Mapping[str, ast.Module]) -> None:
    assert [name for name, tree in packages.items() if tree.body and not ast.get_docstring(tree)] == []


def test_broad_handlers_stand_only_where_a_reason_is_given(packages: Mapping[str, ast.Module]) -> None:
    found = {
        scope
        for _, scope, node in nodes_of(packages)
        if isinstance(node, ast.ExceptHandler) and is_broad(node) and not cleans_up_and_passes_on(node)
    }
    assert found - set(BROAD_HANDLERS) == set()
    assert set(BROAD_HANDLERS) - found == set()


def test_nothing_that_runs_code_from_a_file_is_used(packages: Mapping[str, ast.Module]) -> None:
    unsafe, caged = [], set()
    for module, scope, node in nodes_of(packages):
        if isinstance(node, ast.Import):
            unsafe += [f"{module}:{node.lineno} {a.name}" for a in node.names if a.name in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in UNSAFE_MODULES:
            unsafe.append(f"{module}:{node.lineno} {node.module}")
        elif isinstance(node, ast.Call) and dotted(node.func) in UNSAFE_CALLS:
            if scope in CAGED_CALLS and _says_weights_only(node):
                caged.add(scope)
            else:
                unsafe.append(f"{module}:{node.lineno} {dotted(node.func)}")
    assert unsafe == []
    assert caged == set(CAGED_CALLS)


def _says_weights_only(call: ast.Call) -> bool:
    return any(
        keyword.arg == "weights_only" and ast.dump(keyword.value) == ast.dump(ast.Constant(True))
        for keyword in call.keywords
    )


def test_no_part_is_there_in_name_only(packages: Mapping[str, ast.Module]) -> None:
    unfinished = [
        f"{module}:{node.lineno}"
        for module, _, node in nodes_of(packages)
        if isinstance(node, ast.Name) and node.id in {"NotImplementedError", "NotImplemented"}
    ]
    assert unfinished == []


def test_no_module_keeps_state(packages: Mapping[str, ast.Module]) -> None:
    """Module-level containers are constants by name; nothing is rebound from inside a function."""
    empty_makers = {"list", "dict", "set", "defaultdict", "deque", "OrderedDict"}
    state = [f"{m}:{n.lineno} global" for m, _, n in nodes_of(packages) if isinstance(n, ast.Global)]
    for module, tree in packages.items():
        for node in tree.body:
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                continue
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("__")]
            value = node.value
            literal = isinstance(value, ast.List | ast.Dict | ast.Set)
            empty = literal and not (value.keys if isinstance(value, ast.Dict) else value.elts)  # type: ignore[union-attr]
            made = (
                isinstance(value, ast.Call)
                and dotted(value.func).split(".")[-1] in empty_makers
                and not value.args
            )
            if names and (empty or made or (literal and not names[0].isupper())):
                state.append(f"{module}:{node.lineno} {names[0]}")
    assert state == []


def test_every_test_file_has_a_test(everything: Mapping[str, ast.Module]) -> None:
    hollow = [
        name
        for name, tree in everything.items()
        if name.split(".")[-1].startswith("test_")
        and not any(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
            for node in ast.walk(tree)
        )
        and "TestCase" not in ast.dump(tree)
    ]
    assert hollow == []


def test_tests_use_real_parts(everything: Mapping[str, ast.Module]) -> None:
    mocked = [
        f"{module}:{node.lineno}"
        for module, _, node in nodes_of(everything)
        if (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unittest.mock"))
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "unittest"
            and "mock" in {a.name for a in node.names}
        )
    ]
    assert mocked == []
