"""The ΔW of every method's parts against the tests' own reading of the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.errors import AdapterMismatch
from timbre_methods.merging.changes import Additive, Ingredient, as_factors, delta_at
from timbre_methods.program import AdapterProgram, Part
from timbre_methods.registry import compile_adapter, derive, methods, sites_of


def without_ties(shape: torch.Size) -> Tensor:
    """A random weight, all of whose magnitudes differ."""
    count, generator = shape.numel(), torch.Generator().manual_seed(shape.numel())
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    return (signs * (torch.randperm(count, generator=generator) + 1) / count).reshape(shape)


@pytest.fixture(scope="module")
def parts(llama: nn.Module, evaluate: ModuleType) -> dict[type, list[tuple[str, str, Part]]]:
    """By their type: those of a random adapter of every method, with method and path."""
    sites = {
        path: replace(site, weight_OI=without_ties(site.weight_OI.shape))
        for path, site in evaluate.all_sites(llama).items()
    }
    found: dict[type, list[tuple[str, str, Part]]] = {}
    for name, method in methods().items():
        for seed in range(3):
            own = sites_of(method, sites)
            config, tensors = method.example(own, torch.Generator().manual_seed(seed))
            program = compile_adapter(config, {**tensors, **derive(config, tensors, sites)}, sites)
            for path, here in program.sites.items():
                for part in here:
                    found.setdefault(type(part), []).append((name, path, part))
    return found


@pytest.mark.parametrize("kind", get_args(Additive), ids=lambda kind: kind.__name__)
def test_a_part_s_change_is_what_it_does_to_every_input(
    llama: nn.Module, evaluate: ModuleType, parts: dict[type, list[tuple[str, str, Part]]], kind: type
) -> None:
    sites = evaluate.all_sites(llama)
    compared = 0
    for name, path, part in parts[kind]:
        if sites[path].kind == "norm":
            continue
        shape = sites[path].out_features, sites[path].in_features
        single = Ingredient("it", name, AdapterProgram({path: (part,)}))
        everything = torch.eye(shape[1], dtype=torch.float64)
        expected = evaluate.change(part, everything, torch.zeros(shape[1], shape[0], dtype=torch.float64)).T
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            delta_at(single, path, shape).double(),
            expected,
            atol=2e-5 * scale,
            rtol=1e-4,
            msg=f"{name} {path}",
        )
        factors = as_factors(part)
        if factors is not None:
            torch.testing.assert_close(
                factors[1].double() @ factors[0].double(), expected, atol=2e-5 * scale, rtol=1e-4
            )
        compared += 1
    assert compared >= 2


def test_every_other_part_is_refused(parts: dict[type, list[tuple[str, str, Part]]]) -> None:
    others = set(parts) - set(get_args(Additive))
    names = {kind.__name__ for kind in others}
    assert names == {"Diagonal", "Rotation", "Routed", "RoutedBlock", "TokenRows"}
    for kind in others:
        name, path, part = parts[kind][0]
        with pytest.raises(AdapterMismatch, match=f"it .{name}. at {path} has a {kind.__name__} part"):
            delta_at(Ingredient("it", name, AdapterProgram({path: (part,)})), path, (1, 1))
