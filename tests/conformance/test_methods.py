"""The laws of `timbre_methods.contract`, for every method that exists."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import AdapterProgram, Diagonal, Rotation, owned_tensors
from timbre_methods.registry import check_adapter, inspect_adapter, method_for, methods

METHODS = sorted(methods())
SEEDS = range(6)
ROWS = 64
"""So many that each expert of a small mixture is some row's choice."""
HEADER_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
}

each_method = pytest.mark.parametrize("name", METHODS)
each_example = pytest.mark.parametrize("seed", SEEDS)


def on_meta(sites: Mapping[str, Site]) -> dict[str, Site]:
    return {
        path: replace(
            site,
            weight_OI=site.weight_OI.to("meta"),
            bias_O=None if site.bias_O is None else site.bias_O.to("meta"),
        )
        for path, site in sites.items()
    }


def output(evaluate: ModuleType, program: AdapterProgram, site: Site) -> Tensor:
    """The adapted output of one site for one input, in float64."""
    generator = torch.Generator().manual_seed(len(site.path))
    x_TI = torch.randn(ROWS, site.in_features, generator=generator, dtype=torch.float64)
    adapted: Tensor = evaluate.run_parts(site, program.sites.get(site.path, ()), x_TI)
    return adapted


def outputs(evaluate: ModuleType, program: AdapterProgram, sites: Mapping[str, Site]) -> dict[str, Tensor]:
    """That of each site."""
    return {path: output(evaluate, program, site) for path, site in sites.items()}


@each_method
@each_example
def test_the_program_equals_the_papers_formula(
    name: str,
    seed: int,
    tiny_sites: dict[str, Site],
    make_example: Callable[..., Any],
    evaluate: ModuleType,
) -> None:
    example = make_example(name, tiny_sites, seed)
    program = example.compiled(tiny_sites)
    generator = torch.Generator().manual_seed(seed)
    for path, site in tiny_sites.items():
        x_TI = torch.randn(5, site.in_features, generator=generator, dtype=torch.float64)
        expected = example.method.reference(example.config, example.completed(tiny_sites), site, x_TI)
        assert expected.dtype == torch.float64
        actual = evaluate.run_parts(site, program.sites.get(path, ()), x_TI)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-5)


@each_method
@each_example
def test_an_example_changes_its_sites_and_no_other(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any], evaluate: ModuleType
) -> None:
    example = make_example(name, tiny_sites, seed)
    program = example.compiled(tiny_sites)
    base = outputs(evaluate, AdapterProgram({}), tiny_sites)
    adapted = outputs(evaluate, program, tiny_sites)
    changed = {path for path in tiny_sites if (adapted[path] - base[path]).abs().max() > 1e-3}
    assert changed == set(program.sites)
    assert changed


@each_method
@each_example
def test_an_input_that_is_turned_with_a_scale_is_changed_by_nothing_else(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    program = make_example(name, tiny_sites, seed).compiled(tiny_sites)
    for parts in program.sites.values():
        if any(isinstance(part, Rotation) and part.scale_O is not None for part in parts):
            assert not any(isinstance(part, Diagonal) and part.side == "input" for part in parts)


@each_method
def test_examples_are_remade_by_their_seed_and_vary_with_it(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    first, again = make_example(name, tiny_sites, 0), make_example(name, tiny_sites, 0)
    assert first.raw_config == again.raw_config
    assert first.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)
    adapted = {frozenset(make_example(name, tiny_sites, seed).tensors) for seed in SEEDS}
    assert len(adapted) > 1


@each_method
@each_example
def test_one_method_alone_claims_its_example(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    raw_config = json.loads(json.dumps(make_example(name, tiny_sites, seed).raw_config))
    assert [other for other in METHODS if methods()[other].claims(raw_config)] == [name]
    assert method_for(raw_config).name == name


@each_method
@each_example
def test_compiling_on_meta_tells_shapes_dtypes_and_bytes(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, seed)
    real = example.compiled(tiny_sites)
    shapes = {key: tensor.to("meta") for key, tensor in example.tensors.items()}
    derived = example.method.derive(example.config, shapes, on_meta(tiny_sites))
    meta = example.method.compile(example.config, {**shapes, **derived}, on_meta(tiny_sites))
    assert list(meta.sites) == list(real.sites)
    for path, parts in real.sites.items():
        assert [_described(part) for part in meta.sites[path]] == [_described(part) for part in parts]
        assert all(
            tensor.device.type == "meta" for part in meta.sites[path] for tensor in owned_tensors(part)
        )
    assert meta.prepared_bytes == real.prepared_bytes > 0


def _described(part: Any) -> Any:
    """A part, or parts within it, with each tensor replaced by its shape and dtype."""
    if isinstance(part, tuple):
        return [_described(each) for each in part]
    if not hasattr(part, "__dataclass_fields__"):
        return part
    described: list[Any] = [type(part).__name__]
    for part_field in fields(part):
        value = getattr(part, part_field.name)
        if isinstance(value, Tensor):
            described.append((part_field.name, tuple(value.shape), value.dtype))
        else:
            described.append((part_field.name, _described(value)))
    return described


@each_method
def test_an_inspection_agrees_with_the_program(
    name: str, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 1)
    program = example.compiled(tiny_sites)
    header = {
        key: (HEADER_DTYPES[tensor.dtype], list(tensor.shape)) for key, tensor in example.tensors.items()
    }
    inspection = inspect_adapter(example.raw_config, header, on_meta(tiny_sites))
    assert inspection.method == name
    assert inspection.sites == tuple(program.sites)
    assert inspection.prepared_bytes == program.prepared_bytes
    assert inspection == check_adapter(example.raw_config, example.tensors, on_meta(tiny_sites))
    assert 0 < inspection.parameters <= sum(tensor.numel() for tensor in example.tensors.values())


@each_method
@each_example
def test_nothing_given_is_modified_or_kept(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, seed)
    raw_before = copy.deepcopy(example.raw_config)
    tensors_before = {key: tensor.clone() for key, tensor in example.tensors.items()}
    weights = {path: site.weight_OI for path, site in tiny_sites.items() if not site.weight_OI.is_meta}
    weights_before = {path: weight_OI.clone() for path, weight_OI in weights.items()}
    program = example.compiled(tiny_sites)
    completed = example.completed(tiny_sites)
    for site in tiny_sites.values():
        example.method.reference(example.config, completed, site, torch.ones(2, site.in_features))
    assert example.raw_config == raw_before
    assert all(torch.equal(example.tensors[key], before) for key, before in tensors_before.items())
    assert all(torch.equal(weights[path], before) for path, before in weights_before.items())
    given_storage = {tensor.untyped_storage().data_ptr() for tensor in example.tensors.values()}
    kept = [t for parts in program.sites.values() for part in parts for t in owned_tensors(part)]
    assert not given_storage & {tensor.untyped_storage().data_ptr() for tensor in kept}


@each_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_mean_their_own_values(
    name: str, dtype: torch.dtype, tiny_sites: dict[str, Site], make_example: Callable[..., Any]
) -> None:
    example = make_example(name, tiny_sites, 4)
    is_value = {key: t.is_floating_point() and "indices" not in key for key, t in example.tensors.items()}
    halves = {key: t.to(dtype) if is_value[key] else t for key, t in example.tensors.items()}
    widened = {key: t.float() if is_value[key] else t for key, t in halves.items()}
    actual = example.compiled(tiny_sites, tensors=halves)
    expected = example.compiled(tiny_sites, tensors=widened)
    for path, parts in expected.sites.items():
        for part, other in zip(actual.sites[path], parts, strict=True):
            for tensor, wanted in zip(owned_tensors(part), owned_tensors(other), strict=True):
                assert torch.equal(tensor, wanted)


@each_method
@each_example
def test_every_tensor_matters(
    name: str, seed: int, tiny_sites: dict[str, Site], make_example: Callable[..., Any], evaluate: ModuleType
) -> None:
    example = make_example(name, tiny_sites, seed)
    before = outputs(evaluate, example.compiled(tiny_sites), tiny_sites)
    scouted = evaluate.scouted_gates(example.compiled(tiny_sites), ROWS)

    def is_large(change: Tensor) -> bool:
        return bool(change.abs().max() > 1e-4)

    def matters(key: str, changed: Tensor) -> bool:
        try:
            program = example.compiled(tiny_sites, tensors={**example.tensors, key: changed})
        except InvalidTensors:
            return True
        own_first = sorted(tiny_sites, key=lambda path: path.removeprefix("model.") not in key)
        changes = (output(evaluate, program, tiny_sites[path]) - before[path] for path in own_first)
        gates_TLE = evaluate.scouted_gates(program, ROWS)
        return bool((gates_TLE - scouted).abs().gt(1e-4).any()) or any(map(is_large, changes))

    for key, tensor in example.tensors.items():
        if tensor.is_floating_point() and tensor.any():
            # Unevenly: some formulas take directions alone. Turned round: a router may choose, and no more.
            uneven = tensor * torch.linspace(1.05, 1.1, tensor.numel()).view_as(tensor)
            assert matters(key, uneven) or matters(key, -tensor), key
        else:
            assert matters(key, tensor + 1), key
