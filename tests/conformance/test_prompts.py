"""The laws of `timbre_methods.prompt_contract`, for every method of prompts and attention."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timbre_methods.config import INERT
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, MethodError, UnsupportedMethod
from timbre_methods.program import AdapterProgram, owned_tensors
from timbre_methods.prompt_contract import AttentionLayer, Frame
from timbre_methods.registry import (
    check_adapter,
    compile_adapter,
    inspect_adapter,
    method_for,
    methods,
    prompt_methods,
)

METHODS = sorted(prompt_methods())
FRAME = Frame(12, tuple(AttentionLayer(f"model.layers.{i}.self_attn", 4, 2, 3, 3) for i in range(3)))
SHAPES = {"q_proj": (12, 12), "k_proj": (6, 12), "v_proj": (6, 12), "o_proj": (12, 12)}
HEADER_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

each_method = pytest.mark.parametrize("name", METHODS)
each_example = pytest.mark.parametrize("seed", range(6))


def sites(device: str = "cpu") -> dict[str, Site]:
    """The attention's linear layers, with biases in the last layer."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for layer in FRAME.attention:
        for name, shape in SHAPES.items():
            weight_OI, bias_O = (
                torch.randn(shape, generator=generator),
                torch.randn(shape[0], generator=generator),
            )
            bias = bias_O.to(device) if ".2." in layer.path else None
            found[f"{layer.path}.{name}"] = Site(f"{layer.path}.{name}", weight_OI.to(device), bias)
    return found


@dataclass(frozen=True)
class Example:
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def program(
        self,
        config: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
        device: str = "cpu",
        frame: Frame = FRAME,
    ) -> AdapterProgram:
        config = self.config if config is None else config
        tensors = self.tensors if tensors is None else tensors
        moved = {key: tensor.to(device) for key, tensor in tensors.items()}
        return compile_adapter(config, moved, sites(device), frame)


def example(name: str, seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    config, tensors = prompt_methods()[name].example(sites(), FRAME, generator)
    return Example(dict(config), tensors)


def tensors_of(program: AdapterProgram) -> dict[str, Tensor]:
    """Everything that a program owns, by where it acts."""
    return {
        f"{place}.{part_field.name}": getattr(part, part_field.name)
        for place, part in program.placed_parts()
        for part_field in fields(part)
        if isinstance(getattr(part, part_field.name), Tensor)
    }


def test_there_are_methods() -> None:
    assert METHODS
    assert not set(METHODS) & set(methods())


@each_method
@each_example
def test_one_method_alone_claims_its_example(name: str, seed: int) -> None:
    raw = json.loads(json.dumps(example(name, seed).config))
    claimants = [each for each in (*methods().values(), *prompt_methods().values()) if each.claims(raw)]
    assert [each.name for each in claimants] == [name]


@each_method
@each_example
def test_compiling_on_meta_tells_shapes_dtypes_and_bytes(name: str, seed: int) -> None:
    made = example(name, seed)
    real, meta = made.program(), made.program(device="meta")
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors_of(real).items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in tensors_of(meta).items()} == described
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(real).values())
    assert all(tensor.device.type == "meta" for tensor in tensors_of(meta).values())
    assert meta.prepared_bytes == sum(4 * tensor.numel() for tensor in tensors_of(real).values()) > 0
    assert (meta.virtual_tokens, list(meta.sites)) == (real.virtual_tokens, list(real.sites))
    assert set(real.sites) <= set(sites())


@each_method
def test_an_inspection_agrees_with_the_program(name: str) -> None:
    made = example(name, 1)
    program = made.program()
    header = {key: (HEADER_DTYPES[t.dtype], list(t.shape)) for key, t in made.tensors.items()}
    found = inspect_adapter(made.config, header, sites("meta"), FRAME)
    assert (found.method, found.sites, found.prepared_bytes) == (
        name,
        tuple(program.sites),
        program.prepared_bytes,
    )
    assert found.virtual_tokens == program.virtual_tokens == made.config.get("num_virtual_tokens", 0)
    assert found.parameters == sum(tensor.numel() for tensor in made.tensors.values())
    assert found == check_adapter(made.config, made.tensors, sites("meta"), FRAME)


@each_method
@each_example
def test_nothing_given_is_modified_or_kept(name: str, seed: int) -> None:
    made = example(name, seed)
    before = copy.deepcopy(made)
    program = made.program()
    assert made.config == before.config
    assert all(torch.equal(made.tensors[key], tensor) for key, tensor in before.tensors.items())
    given = {tensor.untyped_storage().data_ptr() for tensor in made.tensors.values()}
    kept = [tensor for _, part in program.placed_parts() for tensor in owned_tensors(part)]
    assert not given & {tensor.untyped_storage().data_ptr() for tensor in kept}


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_mean_their_own_values(name: str, dtype: torch.dtype) -> None:
    made = example(name, 4)
    halves = {key: tensor.to(dtype) for key, tensor in made.tensors.items()}
    actual = tensors_of(made.program(tensors=halves))
    wanted = tensors_of(made.program(tensors={key: tensor.float() for key, tensor in halves.items()}))
    assert all(torch.equal(actual[key], wanted[key]) for key in wanted)


@each_method
@each_example
def test_every_tensor_matters(name: str, seed: int) -> None:
    made = example(name, seed)
    before = tensors_of(made.program())
    for key, tensor in made.tensors.items():
        after = tensors_of(made.program(tensors={**made.tensors, key: tensor * 1.05}))
        assert any(not torch.equal(after[place], before[place]) for place in before), key


@each_method
@each_example
def test_missing_surplus_and_misshapen_tensors_are_refused_by_name(name: str, seed: int) -> None:
    made = example(name, seed)
    for key, tensor in made.tensors.items():
        rest = {other: each for other, each in made.tensors.items() if other != key}
        with pytest.raises(InvalidTensors, match="is missing"):
            made.program(tensors=rest)
        wrong = [tensor.unsqueeze(0), tensor.flatten()[0], torch.empty(0, *tensor.shape[1:])]
        wrong += [torch.cat([tensor] * 40, dim=axis) for axis in range(tensor.ndim)]
        for misshapen in wrong:
            with pytest.raises(InvalidTensors, match=r"found .*expected"):
                made.program(tensors={**made.tensors, key: misshapen})
        with pytest.raises(InvalidTensors, match="found dtype bool"):
            made.program(tensors={**made.tensors, key: tensor.to(torch.bool)})
    for key in ("stray", "base_model.model.stray", "derived.model.layers.0.self_attn.q_proj.stray"):
        with pytest.raises(InvalidTensors, match=key.replace(".", r"\.")):
            made.program(tensors={**made.tensors, key: torch.ones(3)})


@each_method
def test_a_base_of_another_size_is_refused(name: str) -> None:
    made = example(name, 0)
    wider = [AttentionLayer(each.path, 8, 4, 5, 5) for each in FRAME.attention]
    with pytest.raises(MethodError, match=r"found .*expected|lacks"):
        made.program(frame=Frame(20, tuple(wider)))
    with pytest.raises(MethodError):
        made.program(frame=Frame(0, ()))


UNSERVED = {
    "a_new_option": True,
    "auto_map": {"AutoModel": "evil.Model"},
    "trust_remote_code": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
}


@each_method
@pytest.mark.parametrize("option", UNSERVED)
def test_an_option_is_refused_by_name_when_on_and_accepted_when_off(name: str, option: str) -> None:
    made = example(name, 0)
    method = method_for(made.config)
    with pytest.raises(UnsupportedMethod, match=f"'{option}' is on"):
        method.parse({**made.config, option: UNSERVED[option]})
    for off in (None, False, "", "none", [], {}):
        assert method.parse({**made.config, option: off}) == method.parse(made.config)


@each_method
@each_example
def test_every_option_is_honoured_refused_or_declared_inert(name: str, seed: int) -> None:
    made = example(name, seed)
    before = tensors_of(made.program())
    inert = INERT | get_type_hints(prompt_methods()[name].parse)["return"].inert
    for key in made.config.keys() - inert:
        for other in (1, 2, 7, "another", [1], {"a": 1}, True):
            if other == made.config[key]:
                continue
            try:
                after = tensors_of(made.program(config={**made.config, key: other}))
            except MethodError:
                continue
            assert after.keys() != before.keys() or any(
                not torch.equal(after[place], tensor) for place, tensor in before.items()
            ), (key, other)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@each_method
@given(data=st.data())
def test_any_config_is_read_or_refused(name: str, data: st.DataObject) -> None:
    made = example(name, 0)
    key = data.draw(st.sampled_from([key for key in sorted(made.config) if key != "peft_type"]))
    refusal = ""
    try:
        made.program(config={**made.config, key: data.draw(JSON)})
    except MethodError as error:
        refusal = str(error)
    assert len(refusal) < 600
