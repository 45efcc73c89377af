"""The table of methods in server/README.md is made from the code; ``--write-tables`` writes it anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from timbre_methods.contract import Reader, Site
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


def prompt_parts_of(name: str, attention: Any) -> list[str]:
    """The same, of a method of prompts and attention."""
    generator = torch.Generator().manual_seed(0)
    config, tensors = prompt_methods()[name].example(attention.sites, attention.frame, generator)
    program = compile_adapter(config, tensors, attention.sites, attention.frame)
    return sorted({type(part).__name__ for _, part in program.placed_parts()})


def takes_a_bias(method: Reader[Any]) -> str:
    """Whether a trained bias (PEFT's option ``bias``) may stand beside it in the file."""
    is_served = get_type_hints(method.parse)["return"].takes_beside and not method.scales_bias
    return "served" if is_served else "refused"


def table(sites: Mapping[str, Site], attention: Any, make_example: Callable[..., Any]) -> str:
    columns = ("method", "paper", "family", "operators", "the file holds, of a layer", "made again")
    columns += ("a bias beside it", "checked against")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    everything = {**methods(), **prompt_methods()}
    for name, method in sorted(everything.items()):
        family = type(method).__module__.split(".")[1].replace("_", " ")
        kinds = parts_of(name, sites, make_example) if name in methods() else prompt_parts_of(name, attention)
        operators = ", ".join(f"`{kind}`" for kind in kinds)
        cells = (f"`{name}`", method.paper, family, operators, method.stored, method.regenerated)
        lines.append(f"| {' | '.join((*cells, takes_a_bias(method), method.checked_against))} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_methods_is_the_codes(
    tiny_sites: Mapping[str, Site],
    attention: Any,
    make_example: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    found, _, after = rest.partition(END)
    expected = table(tiny_sites, attention, make_example)
    if request.config.getoption("--write-tables"):
        PAGE.write_text(before + BEGIN + expected + END + after)
        return
    assert found == expected, "run the test with --write-tables"
