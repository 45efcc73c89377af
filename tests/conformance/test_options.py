"""Change any option of an adapter's config: it is honoured, refused, or declared to change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from timbre_methods.config import INERT
from timbre_methods.contract import Reader, Site
from timbre_methods.errors import MethodError
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import method_for, methods, prompt_methods

SEEDS = range(6)
MORE_SEEDS = range(10)
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


def choices(annotation: Any) -> set[object]:
    """The values that a field lets one choose from, where it lists them: switches and literals."""
    if annotation is bool:
        return {True, False}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) is Annotated:
        return choices(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(choices, get_args(annotation)))
    return set()


def fields_with_choices(found: Mapping[str, Reader[Any]], at_least: int = 1) -> list[tuple[str, str]]:
    """Method and key, where there are so many choices."""
    return [
        (name, key)
        for name, method in found.items()
        for key, field in get_type_hints(method.parse)["return"].model_fields.items()
        if len(choices(field.annotation)) >= at_least
    ]


ITS_START = "it says where training began"
THE_FILES_WIN = "matrices or indices that are in the file are read, whatever the option says"
WITHOUT_EFFECT: Mapping[tuple[str, str], tuple[set[object], str]] = {
    ("alora", "init_lora_weights"): ({False}, ITS_START),
    ("bdlora", "init_lora_weights"): ({False}, ITS_START),
    ("dora", "init_lora_weights"): ({False}, ITS_START),
    ("kasa", "init_lora_weights"): ({False}, ITS_START),
    ("lora", "init_lora_weights"): ({False}, ITS_START),
    ("lora_sb", "init_lora_weights"): ({False}, ITS_START),
    ("lora_xs", "init_lora_weights"): ({False}, ITS_START),
    ("loldu", "init_method"): (
        {"lu", "s_uniform", "s_normal", "ones", "zeros"},
        "each keeps the base whole, and a start that is in the file is read, whatever the option says",
    ),
    ("parameter_lora", "init_lora_weights"): ({False}, ITS_START),
    ("pvera", "save_projection"): ({False}, THE_FILES_WIN),
    ("qalora", "init_lora_weights"): ({False}, ITS_START),
    ("randlora", "save_projection"): ({False}, THE_FILES_WIN),
    ("unilora", "save_indices"): ({False}, THE_FILES_WIN),
    ("vera", "save_projection"): ({False}, THE_FILES_WIN),
    ("waveft", "proportional_parameters"): ({True}, "it lets each layer have the number that its tensor has"),
}
"""Choices that change nothing where the examples' own is replaced by them, with the reason."""


def outputs(evaluate: ModuleType, program: AdapterProgram, sites: Mapping[str, Site]) -> Tensor:
    """What every layer and a scout give for one input, all in one row of numbers."""
    generator = torch.Generator().manual_seed(23)
    rows = [
        evaluate.run_parts(
            site,
            program.sites.get(path, ()),
            torch.randn(3, site.in_features, generator=generator, dtype=torch.float64),
        )
        for path, site in sites.items()
    ]
    return torch.cat([*(row.flatten() for row in rows), evaluate.scouted_gates(program).flatten()])


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


@pytest.mark.parametrize(("name", "key"), fields_with_choices(methods(), at_least=2))
def test_every_other_choice_is_refused_by_name_or_changes_the_output(
    name: str, key: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any], evaluate: ModuleType
) -> None:
    """Each choice in at least one example: some matter only beside others."""
    every = choices(get_type_hints(methods()[name].parse)["return"].model_fields[key].annotation)
    ignored: set[object] = set()
    honoured: set[object] = set()
    refusals: dict[object, str] = {}
    for seed in MORE_SEEDS:
        example = make_example(name, tiny_sites, seed)
        before = outputs(evaluate, example.compiled(tiny_sites), tiny_sites)
        for value in every - honoured - {getattr(example.config, key)}:
            try:
                changed = example.compiled(tiny_sites, {**example.raw_config, key: value})
                counts = not torch.equal(before, outputs(evaluate, changed, tiny_sites))
            except MethodError as refusal:
                refusals[value] = str(refusal)
                counts = True
            (honoured if counts else ignored).add(value)
    assert [text for value, text in refusals.items() if not is_by_name(text, key, value)] == []
    assert ignored | honoured
    assert ignored - honoured == WITHOUT_EFFECT.get((name, key), (set(), ""))[0]


def is_by_name(refusal: str, key: str, value: object) -> bool:
    """Whether it names the option, what was chosen or the first tensor that does not go with it."""
    return key in refusal or (isinstance(value, str) and value in refusal) or "base_model." in refusal


@pytest.mark.parametrize(("name", "key"), fields_with_choices({**methods(), **prompt_methods()}))
@pytest.mark.parametrize("wrong", ["another", "true", 2, 0.0, [True]], ids=repr)
def test_what_is_no_choice_is_refused_by_name(
    name: str, key: str, wrong: object, config_of: Callable[[str], dict[str, Any]]
) -> None:
    method = {**methods(), **prompt_methods()}[name]
    with pytest.raises(MethodError, match=key):
        method.parse({**config_of(name), key: wrong})


def test_prompts_have_no_choice() -> None:
    found = fields_with_choices(prompt_methods())
    assert found
    assert {key for _, key in found} == {"num_transformer_submodules"}, "1 or nothing, which means 1"
