"""Everything fits a screen or two. The limits are about reading time; an exception needs its reason here."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping

FILE_LINES = 300
CLASS_LINES = 200
FUNCTION_LINES = 50
PARAMETERS = 7

# "module:qualified name" -> why it may be longer. An entry that no longer needs to be here fails the test.
EXCEPTIONS: Mapping[str, str] = {}


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(tree: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{node.name}"
            yield name, node
            yield from definitions(node, f"{name}.")
        else:
            yield from definitions(node, prefix)


def lines_of(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    if names[:1] in (["self"], ["cls"]):
        names = names[1:]
    return len(names) + len(node.args.kwonlyargs)


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: its parameters are pointers and sizes, which no object can carry."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)


def too_large(everything: Mapping[str, ast.Module]) -> dict[str, str]:
    found = {}
    for module, tree in everything.items():
        for name, node in definitions(tree, f"{module}:"):
            if isinstance(node, ast.ClassDef):
                if lines_of(node) > CLASS_LINES:
                    found[name] = f"{lines_of(node)} lines, {CLASS_LINES} at most"
                continue
            if lines_of(node) > FUNCTION_LINES:
                found[name] = f"{lines_of(node)} lines, {FUNCTION_LINES} at most"
            if parameters_of(node) > PARAMETERS and not is_kernel(node):
                found[name] = f"{parameters_of(node)} parameters, {PARAMETERS} at most: a frozen dataclass"
    return found


def test_classes_functions_and_parameter_lists_are_small(everything: Mapping[str, ast.Module]) -> None:
    found = too_large(everything)
    assert {name: text for name, text in found.items() if name not in EXCEPTIONS} == {}
    assert [name for name in EXCEPTIONS if name not in found] == []


def test_files_are_small(tracked_text: Mapping[str, str]) -> None:
    long = {
        name: len(text.splitlines())
        for name, text in tracked_text.items()
        if name.endswith(".py") and len(text.splitlines()) > FILE_LINES
    }
    assert long == {}


def test_the_limits_see_a_function_that_is_too_long_and_one_that_asks_too_much() -> None:
    long = "def long():\n" + "    pass\n" * FUNCTION_LINES
    greedy = "class A:\n    def greedy(self, a, b, c, d, e, f, g, h): ...\n"
    found = too_large({"sample": ast.parse(long + greedy)})
    assert found == {
        "sample:long": "51 lines, 50 at most",
        "sample:A.greedy": "8 parameters, 7 at most: a frozen dataclass",
    }
