"""The table of methods in server/README.md is made from the code; ``--write-tables`` writes it anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from timbre_methods.contract import Site
from timbre_methods.prompt_contract import AttentionLayer, Frame
from timbre_methods.registry import compile_adapter, methods, prompt_methods

PAGE = Path(__file__).parents[2] / "server" / "README.md"
BEGIN, END = "<!-- methods: begin -->\n", "<!-- methods: end -->\n"
SEEDS = range(12)


def parts_of(name: str, sites: Mapping[str, Site], make_example: Callable[..., Any]) -> list[str]:
    """The kinds of parts that a method's examples compile to."""
    programs = [make_example(name, sites, seed).compiled(sites) for seed in SEEDS]
    kinds = {
        type(part).__name__ for program in programs for parts in program.sites.values() for part in parts
    }
    return sorted(kinds)


def prompt_parts_of(name: str) -> list[str]:
    """The same, of a method of prompts and attention."""
    layer = AttentionLayer("layers.0.attention", num_heads=2, num_kv_heads=2, key_dim=4, value_dim=4)
    paths = [f"{layer.path}.{projection}_proj" for projection in "qkvo"]
    sites = {path: Site(path, torch.eye(8), torch.ones(8)) for path in paths}
    method, frame = prompt_methods()[name], Frame(8, (layer,))
    config, tensors = method.example(sites, frame, torch.Generator().manual_seed(0))
    program = compile_adapter(config, tensors, sites, frame)
    return sorted({type(part).__name__ for _, part in program.placed_parts()})


def table(sites: Mapping[str, Site], make_example: Callable[..., Any]) -> str:
    lines = [
        "| method | paper | family | operators | the file holds, of a layer | made again | checked against |",
        "|---|---|---|---|---|---|---|",
    ]
    everything = {**methods(), **prompt_methods()}
    for name, method in sorted(everything.items()):
        family = type(method).__module__.split(".")[1].replace("_", " ")
        kinds = parts_of(name, sites, make_example) if name in methods() else prompt_parts_of(name)
        operators = ", ".join(f"`{kind}`" for kind in kinds)
        cells = (f"`{name}`", method.paper, family, operators, method.stored)
        lines.append(f"| {' | '.join((*cells, method.regenerated, method.checked_against))} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_methods_is_the_codes(
    tiny_sites: Mapping[str, Site], make_example: Callable[..., Any], request: pytest.FixtureRequest
) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    expected = table(tiny_sites, make_example)
    if request.config.getoption("--write-tables"):
        PAGE.write_text(before + BEGIN + expected + END + after)
        return
    assert found == expected, "run the test with --write-tables"
