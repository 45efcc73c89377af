"""What every method refuses, by name, and what it accepts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from timbre_methods.contract import Site
from timbre_methods.errors import (
    AdapterMismatch,
    InvalidTensors,
    MethodError,
    UnsupportedMethod,
)
from timbre_methods.registry import methods
from timbre_methods.site_tensors import PREFIX

METHODS = sorted(methods())
SEEDS = range(6)


def in_names(path: str) -> str:
    """A module as the names of all formats have it: some leave out what the base is called."""
    return f".{path.removeprefix('model.')}."


each_method = pytest.mark.parametrize("name", METHODS)
each_example = pytest.mark.parametrize("seed", SEEDS)


@each_method
@each_example
def test_a_missing_tensor_is_refused_or_leaves_its_site_alone(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, seed)
    for missing in example.tensors:
        rest = {key: tensor for key, tensor in example.tensors.items() if key != missing}
        path = next((path for path in tiny_sites if f".{path}." in missing), None)
        of_layers = [key for key in rest if key.startswith("base_model.model.")]
        if path is None or any(f".{path}." in key for key in rest) or not of_layers:
            with pytest.raises(InvalidTensors, match=r"is missing|holds no tensor"):
                example.compiled(tiny_sites, tensors=rest)
        else:
            embedding = tiny_sites[path].tied_to
            follows_its_embedding = f"{PREFIX}{embedding}.trainable_tokens_delta" in rest
            is_changed = path in example.compiled(tiny_sites, tensors=rest).sites
            assert not is_changed or follows_its_embedding


@each_method
def test_a_surplus_tensor_is_refused_by_name(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 2)
    of_layers = [key for key in example.tensors if key.startswith("base_model.model.")]
    first = of_layers[0] if of_layers else "base_model.model.lm_head.stray"
    surplus = [
        "derived.model.layers.0.self_attn.q_proj.stray",
        "stray",
        "base_model.model.stray",
        "base_model.model.model.layers.0.self_attn.q_proj.stray.weight",
        "base_model.model.lm_head.base_layer.weight",
        first.removeprefix("base_model."),
        first + ".weight",
    ]
    for key in surplus:
        with pytest.raises(InvalidTensors, match=key.replace(".", r"\.")):
            example.compiled(tiny_sites, tensors={**example.tensors, key: torch.ones(3)})


@each_method
def test_a_layer_that_the_base_lacks_is_refused_with_what_there_is(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example, path = next(
        (example, path)
        for example in (make_example(name, tiny_sites, seed) for seed in SEEDS)
        for path in tiny_sites
        if any(in_names(path) in key for key in example.tensors)
    )
    absent = "model.layers.7.mlp.up_proj"
    moved = {
        key.replace(f".{path}.", f".{absent}.").replace(in_names(path), in_names(absent)): tensor
        for key, tensor in example.tensors.items()
    }
    with pytest.raises(AdapterMismatch, match=r"has no .*'model\.layers\.7\.mlp\.up_proj'.* 0, 1"):
        example.compiled(tiny_sites, tensors=moved)


@each_method
@each_example
def test_a_misshapen_tensor_is_refused_with_found_and_expected(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, seed)
    for key, tensor in example.tensors.items():
        wrong = [tensor.unsqueeze(0), tensor.flatten()[0], torch.empty(0, *tensor.shape[1:])]
        wrong += [torch.cat([tensor] * 40, dim=axis) for axis in range(tensor.ndim)]
        for misshapen in wrong:
            with pytest.raises(InvalidTensors, match=r"found .*(expected|config says)"):
                example.compiled(tiny_sites, tensors={**example.tensors, key: misshapen.to(tensor.dtype)})


@each_method
def test_a_tensor_of_a_foreign_dtype_is_refused(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 3)
    for key, tensor in example.tensors.items():
        with pytest.raises(InvalidTensors, match="found dtype bool"):
            example.compiled(tiny_sites, tensors={**example.tensors, key: tensor.to(torch.bool)})


UNSERVED = {
    "a_new_option": True,
    "auto_map": {"AutoModel": "evil.Model"},
    "trust_remote_code": True,
    "_attn_implementation_internal": "someone/kernel",
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.down_proj"],
    "megatron_config": {"tensor_model_parallel_size": 2},
}


def read_by(name: str) -> set[str]:
    """The options that a method reads."""
    return set(get_type_hints(methods()[name].parse)["return"].model_fields)


unserved_options = pytest.mark.parametrize(
    ("name", "option"),
    [(name, option) for name in METHODS for option in UNSERVED if option not in read_by(name)],
)


@unserved_options
def test_an_option_that_is_on_and_not_served_is_refused_by_name(
    name: str, option: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 0)
    with pytest.raises(UnsupportedMethod, match=f"'{option}' is on"):
        example.method.parse({**example.raw_config, option: UNSERVED[option]})


@unserved_options
@pytest.mark.parametrize("off", [None, False, "", "none", "None", [], {}, 0], ids=repr)
def test_an_option_that_is_off_is_accepted(
    name: str, option: str, off: object, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 0)
    assert example.method.parse({**example.raw_config, option: off}) == example.config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@each_method
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_read_or_refused(
    name: str, data: st.DataObject, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 0)
    key = data.draw(st.sampled_from([key for key in sorted(example.raw_config) if key != "peft_type"]))
    raw_config = {**example.raw_config, key: data.draw(JSON)}
    refusal = ""
    try:
        example.compiled(tiny_sites, raw_config=raw_config)
    except MethodError as error:
        refusal = str(error)
    assert len(refusal) < 600
