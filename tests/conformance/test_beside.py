"""What may stand in the file beside any method: trained biases, whole layers and rows of tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor

from timbre_methods.beside import BIAS, TOKENS
from timbre_methods.config import BESIDE
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import methods, prompt_methods
from timbre_methods.site_tensors import PREFIX

SEEDS = range(200)
EXAMPLES = 2
NOT_PEFTS_FILES = {"llava_mole", "loramoe", "mixlora", "mola", "xlora"}
ALONE = {"alora", *NOT_PEFTS_FILES, *prompt_methods()}
"""Methods that act on some of a request's rows or outside its layers, where whatever stands beside them would
act on all rows; and those in whose files nothing of PEFT's can stand."""
SERVED = sorted(methods().keys() - ALONE)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
NOT_SERVED = {
    "bias": "all",
    "ensure_weight_tying": True,
    "modules_to_save": [HEAD],
    "trainable_token_indices": [1],
}
OFF: tuple[object, ...] = (None, False, "", "none", [], {})
BARE = {"trainable_tokens": "neither the embedding nor the head of these sites has a bias"}
"""Methods whose examples adapt no layer with a bias."""
ROWS_OF_ITS_OWN = {"trainable_tokens": "its own tensors have the names of token rows"}

each_method = pytest.mark.parametrize("name", SERVED)
each_method_at_a_bias = pytest.mark.parametrize("name", [name for name in SERVED if name not in BARE])
Examples = Callable[..., list[Any]]


@pytest.fixture
def examples(all_sites: dict[str, Site], make_example: Callable[..., Any]) -> Examples:
    """Several examples of a method by its name, of those that fit."""

    def found(name: str, fits: Callable[[Any], bool] = lambda example: True) -> list[Any]:
        made = (make_example(name, all_sites, seed) for seed in SEEDS)
        chosen = list(islice(filter(fits, made), EXAMPLES))
        assert len(chosen) == EXAMPLES
        return chosen

    return found


def with_biases(example: Any, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """A trained bias for every adapted layer that has one, by path."""
    generator = torch.Generator().manual_seed(31)
    adapted = [sites[path] for path in example.compiled(sites).sites]
    return {
        site.path: torch.randn(site.out_features, generator=generator)
        for site in adapted
        if site.bias_O is not None
    }


def outputs(evaluate: ModuleType, program: AdapterProgram, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """The adapted output of each layer for one input, in float64."""
    generator = torch.Generator().manual_seed(23)
    return {
        path: evaluate.run_parts(
            site,
            program.sites.get(path, ()),
            torch.randn(4, site.in_features, generator=generator, dtype=torch.float64),
        )
        for path, site in sites.items()
    }


def differing(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    return {path for path, y in after.items() if not torch.equal(y, before[path])}


@each_method_at_a_bias
def test_a_method_says_whether_it_changes_what_the_bias_adds(
    name: str, all_sites: dict[str, Site], examples: Examples
) -> None:
    """By the paper's formula: another bias moves the output by their difference, or by something else."""
    moves = []
    for example in examples(name, lambda each: bool(with_biases(each, all_sites))):
        config, tensors = example.config, example.completed(all_sites)
        for path, bias_O in with_biases(example, all_sites).items():
            site = all_sites[path]
            x_TI = torch.ones(3, site.in_features, dtype=torch.float64)
            trained = example.method.reference(config, tensors, replace(site, bias_O=bias_O), x_TI)
            moved_TO = trained - example.method.reference(config, tensors, site, x_TI)
            step_O = (bias_O.double() - site.bias_O.double()).expand_as(moved_TO)
            moves.append(torch.allclose(moved_TO, step_O, rtol=0, atol=1e-6))
    assert all(moves) != methods()[name].scales_bias


@each_method_at_a_bias
def test_a_trained_bias_takes_the_place_of_the_bases_or_is_refused_by_name(
    name: str, all_sites: dict[str, Site], examples: Examples, evaluate: ModuleType
) -> None:
    for example in examples(name, lambda each: bool(with_biases(each, all_sites))):
        raw_config = {**example.raw_config, "bias": "all"}
        trained = with_biases(example, all_sites)
        named = {f"{PREFIX}{path}.{BIAS}": bias_O for path, bias_O in trained.items()}
        if example.method.scales_bias:
            for key, bias_O in named.items():
                with pytest.raises(InvalidTensors, match=rf"{re.escape(key)} is not served: {name} changes"):
                    example.compiled(all_sites, raw_config, {**example.tensors, key: bias_O})
            continue
        program = example.compiled(all_sites, raw_config, {**example.tensors, **named})
        for path, site in all_sites.items():
            if site.kind in example.method.kinds:
                meant = replace(site, bias_O=trained.get(path, site.bias_O))
                x_TI = torch.linspace(-1, 1, 2 * site.in_features, dtype=torch.float64).view(2, -1)
                expected = example.method.reference(example.config, example.completed(all_sites), meant, x_TI)
                actual = evaluate.run_parts(site, program.sites.get(path, ()), x_TI)
                torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-5)


@each_method_at_a_bias
def test_a_bias_needs_its_option_and_a_layer_that_has_one(
    name: str, all_sites: dict[str, Site], examples: Examples
) -> None:
    example, _ = examples(name, lambda each: bool(with_biases(each, all_sites)))
    for path in with_biases(example, all_sites):
        given = {**example.tensors, f"{PREFIX}{path}.{BIAS}": torch.ones(all_sites[path].out_features)}
        for off in ("none", None):
            with pytest.raises(InvalidTensors, match=rf"{re.escape(path)}\.base_layer\.bias"):
                example.compiled(all_sites, {**example.raw_config, "bias": off}, given)
    bare = [path for path in example.compiled(all_sites).sites if all_sites[path].bias_O is None]
    for path in bare:
        given = {**example.tensors, f"{PREFIX}{path}.{BIAS}": torch.ones(all_sites[path].out_features)}
        with pytest.raises(InvalidTensors, match=rf"{re.escape(path)}\.base_layer\.bias"):
            example.compiled(all_sites, {**example.raw_config, "bias": "all"}, given)


@each_method
def test_a_layer_saved_whole_changes_that_layer_alone(
    name: str, all_sites: dict[str, Site], examples: Examples, evaluate: ModuleType
) -> None:
    for example in examples(name):
        before = example.compiled(all_sites)
        path = next(path for path in all_sites if path not in before.sites)
        saved = {f"{PREFIX}{path}.weight": torch.ones(stored_shape(all_sites[path]))}
        if all_sites[path].bias_O is not None:
            saved[f"{PREFIX}{path}.bias"] = torch.ones(all_sites[path].out_features)
        on = {**example.raw_config, "modules_to_save": [path]}
        program = example.compiled(all_sites, on, {**example.tensors, **saved})
        assert list(program.sites) == [each for each in all_sites if each in {path, *before.sites}]
        ran = outputs(evaluate, before, all_sites), outputs(evaluate, program, all_sites)
        assert differing(*ran) == {path}
        for key in saved:
            rest = {other: tensor for other, tensor in saved.items() if other != key}
            with pytest.raises(InvalidTensors, match=rf"{re.escape(key)} is missing, while modules_to_save"):
                example.compiled(all_sites, on, {**example.tensors, **rest})


@pytest.mark.parametrize("name", [name for name in SERVED if name not in ROWS_OF_ITS_OWN])
def test_rows_of_tokens_change_their_layer_and_the_head_that_is_tied_to_it(
    name: str, all_sites: dict[str, Site], examples: Examples, evaluate: ModuleType
) -> None:
    example, _ = examples(name, lambda each: not {EMBEDDING, HEAD} & each.compiled(all_sites).sites.keys())
    rows = {path: {f"{PREFIX}{path}.{TOKENS}": torch.ones(2, 12)} for path in (EMBEDDING, HEAD)}
    on = {**example.raw_config, "trainable_token_indices": [3, 1]}
    before = outputs(evaluate, example.compiled(all_sites), all_sites)
    for given, changed in ((EMBEDDING, {EMBEDDING, HEAD}), (HEAD, {HEAD})):
        program = example.compiled(all_sites, on, {**example.tensors, **rows[given]})
        assert differing(before, outputs(evaluate, program, all_sites)) == changed
        with pytest.raises(InvalidTensors, match=rf"{re.escape(given)}.* is surplus"):
            example.compiled(all_sites, tensors={**example.tensors, **rows[given]})
    with pytest.raises(InvalidTensors, match="is missing, while trainable_token_indices"):
        example.compiled(all_sites, on)


@each_method
def test_options_that_are_off_change_nothing(
    name: str, all_sites: dict[str, Site], examples: Examples, evaluate: ModuleType
) -> None:
    example, _ = examples(name)
    expected = outputs(evaluate, example.compiled(all_sites), all_sites)
    for off in OFF:
        raw_config = {**example.raw_config, **dict.fromkeys(BESIDE, off)}
        assert example.method.parse(raw_config) == example.config
        program = example.compiled(all_sites, raw_config)
        assert differing(expected, outputs(evaluate, program, all_sites)) == set()


def stored_shape(site: Site) -> tuple[int, ...]:
    shape = tuple(site.weight_OI.shape)
    return shape[::-1] if site.is_transposed else shape


def test_the_methods_that_take_nothing_beside_them_say_so() -> None:
    everything = {**methods(), **prompt_methods()}
    configs = {name: get_type_hints(method.parse)["return"] for name, method in everything.items()}
    assert {name for name, model in configs.items() if not model.takes_beside} == ALONE
    assert NOT_SERVED.keys() == BESIDE


@pytest.mark.parametrize("name", sorted(ALONE))
@pytest.mark.parametrize("option", sorted(BESIDE))
def test_a_method_that_takes_nothing_beside_it_refuses_each_option_by_name(
    name: str, option: str, config_of: Callable[[str], dict[str, Any]]
) -> None:
    method = {**methods(), **prompt_methods()}[name]
    with pytest.raises(UnsupportedMethod, match=f"'{option}' is on"):
        method.parse({**config_of(name), option: NOT_SERVED[option]})
    for off in OFF:
        assert method.parse({**config_of(name), option: off}) == method.parse(config_of(name))
