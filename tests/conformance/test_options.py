"""Change any option of an adapter's config: it is honoured, refused, or declared to change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from timbre_methods.config import INERT
from timbre_methods.contract import Site
from timbre_methods.errors import MethodError
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import method_for, methods

SEEDS = range(6)
FURTHER = {"init_lora_weights": ("corda",), "init_weights": ("bat", "mini")}
"""Values of another kind that an option may have, too."""


def other_values(value: object, key: str = "") -> Iterator[object]:
    """Values of the same kind that mean something else."""
    yield from FURTHER.get(key, ())
    match value:
        case bool():
            yield not value
        case int():
            yield from (value + 1, max(value - 1, 0), 2 * value + 3)
        case float():
            yield from (value * 1.05 + 0.01, -value)
        case str():
            yield from (value.swapcase(), "another")
        case list():
            yield from ([*value, *value[:1]], value[1:], [])
        case dict():
            if value:
                yield {}
            for name, inner in value.items():
                yield from ({**value, name: other} for other in other_values(inner))


def outputs(evaluate: ModuleType, program: AdapterProgram, sites: Mapping[str, Site]) -> Tensor:
    """What every layer gives for one input, all in one row of numbers."""
    generator = torch.Generator().manual_seed(23)
    rows = [
        evaluate.run_parts(
            site,
            program.sites.get(path, ()),
            torch.randn(3, site.in_features, generator=generator, dtype=torch.float64),
        )
        for path, site in sites.items()
    ]
    return torch.cat([row.flatten() for row in rows])


def inert_keys(raw_config: dict[str, Any]) -> frozenset[str]:
    """What the method that reads this config declares to change nothing."""
    model = get_type_hints(method_for(raw_config).parse)["return"]
    return INERT | model.inert


@pytest.mark.parametrize("name", sorted(methods()))
def test_every_option_is_honoured_refused_or_declared_inert(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any], evaluate: ModuleType
) -> None:
    """In at least one example: some options matter only beside others."""
    ignored: set[str] = set()
    honoured: set[str] = set()
    for seed in SEEDS:
        example = make_example(name, tiny_sites, seed)
        program = example.compiled(tiny_sites)
        before = outputs(evaluate, program, tiny_sites)
        for key in example.raw_config.keys() - inert_keys(example.raw_config) - honoured:
            for value in other_values(example.raw_config[key], key):
                try:
                    changed = example.compiled(tiny_sites, {**example.raw_config, key: value})
                    counts = program.invocation_tokens != changed.invocation_tokens
                    counts |= not torch.equal(before, outputs(evaluate, changed, tiny_sites))
                except MethodError:
                    counts = True
                (honoured if counts else ignored).add(key)
    assert ignored - honoured == set()
