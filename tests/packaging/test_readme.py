"""What the pages say exists, exists: targets, files, routes, settings, links."""

from __future__ import annotations

import ast
import re
import runpy
from functools import cache
from pathlib import Path

import pytest

from timbre_server.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]
SERVER = REPOSITORY / "server/timbre_server"
PAGES = ("README.md", "server/README.md", "clients/python/README.md")
# Paths of the HTTP API's own making, not of a file of ours.
ROUTE = re.compile(r"(?:127\.0\.0\.1:8000|`)(/(?:v1/[a-z_/]+[a-z]|livez|readyz|health|metrics))\b")


def read(page: str) -> str:
    return (REPOSITORY / page).read_text()


def is_served(named: str) -> bool:
    """Whether a path is a route's, or stands for a template's behind some router's prefix."""
    paths = served_paths()
    templates = (prefix + path for prefix in ("", *paths) for path in paths if "{" in path)
    return named in paths or any(re.fullmatch(re.sub(r"{\w+}", "[^/]+", each), named) for each in templates)


@cache
def served_paths() -> set[str]:
    """String constants that begin like a path, from all of HTTP's modules."""
    return {
        node.value
        for path in (SERVER / "http").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("/")
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[a-z-]+)?\)", read(page))
    folder = (REPOSITORY / page).parent
    assert [target for target in targets if not (folder / target).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_are_named_exist(page: str) -> None:
    named = set(re.findall(r"(?:^ {4}|`)make ([a-z]+)", read(page), re.MULTILINE))
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    assert named - targets == set()


def test_tests_that_are_named_as_proof_exist() -> None:
    folders = re.findall(r"ARGS=(tests/[a-z_/]+)", read("README.md"))
    assert folders
    assert [folder for folder in folders if not list((REPOSITORY / folder).rglob("test_*.py"))] == []


@pytest.mark.parametrize("page", PAGES)
def test_routes_that_are_named_are_served(page: str) -> None:
    assert [path for path in ROUTE.findall(read(page)) if not is_served(path)] == []


def test_a_path_of_no_route_is_told_from_one() -> None:
    assert is_served("/v1/adapters/pirate/pin")
    assert not is_served("/v1/adapters/pirate/unpin")


@pytest.mark.parametrize("page", PAGES)
def test_flags_and_variables_that_are_named_are_settings(page: str) -> None:
    text = read(page)
    flags = {flag.replace("-", "_") for flag in re.findall(r"timbre serve.*? --([a-z-]+)", text)} - {"help"}
    variables = {name.lower() for name in re.findall(r"\bTIMBRE_([A-Z_]*[A-Z])\b", text)}
    assert (flags | variables) - set(Settings.model_fields) == set()


def test_files_that_the_architecture_page_names_exist() -> None:
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", read("server/README.md")))
    below = {path.relative_to(SERVER).as_posix() for path in SERVER.rglob("*.py")}
    places = below | {name.split("/", 1)[1] for name in below if "/" in name}
    places |= {path.name for path in (REPOSITORY / "adapters_store/timbre_methods").glob("*.py")}
    places |= {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests").rglob("*.py")}
    assert named - places == set()


def test_the_picture_is_what_its_script_draws_of_the_figures_beside_it() -> None:
    script = runpy.run_path(str(REPOSITORY / "tests/bench/throughput_picture.py"))
    assert script["drawn"](script["lines"]()) == read("tests/bench/throughput.svg")
