"""NOLA against numbers worked out here; PEFT does not have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, derive, method_for

PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
RAW = {
    "peft_type": "NOLA",
    "r": 1,
    "lora_alpha": 3,
    "num_basis_A": 2,
    "num_basis_B": 1,
    "normalised": False,
    "drawn_on": "cpu",
}

# torch.rand of seed 0, as every torch has drawn it on a CPU in float32.
UNIFORM = torch.tensor([0.4963, 0.7682, 0.0885, 0.1320, 0.3074, 0.6341, 0.4901, 0.8964], dtype=torch.float64)


def tensors() -> dict[str, Tensor]:
    """For a layer of 3 x 4."""
    return {
        f"{STEM}.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        f"{STEM}.lora_A.coefficients": torch.tensor([10.0, -1.0]),
        f"{STEM}.lora_A.seed": torch.tensor([0]),
        f"{STEM}.lora_B.weight": torch.tensor([[0.0], [0.5], [0.0]]),
        f"{STEM}.lora_B.coefficients": torch.tensor([2.0]),
        f"{STEM}.lora_B.seed": torch.tensor([0]),
    }


def compiled(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> LowRank:
    sites = {base.path: base}
    check_adapter(raw, given, sites)
    method = method_for(raw)
    program = method.compile(method.parse(raw), {**given, **derive(raw, given, sites)}, sites)
    [part] = program.sites[base.path]
    return part


@pytest.mark.parametrize("normalised", [False, True])
def test_the_random_matrices_are_the_streams_numbers_in_order(
    normalised: bool, site: Callable[..., Site]
) -> None:
    part = compiled({**RAW, "normalised": normalised}, tensors(), site(out_features=3, in_features=4))
    first, second = 2 * UNIFORM[:4] - 1, 2 * UNIFORM[4:] - 1
    added_I = (10 * first - second) / (2**0.5 if normalised else 1)
    a_RI = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64) + added_I
    b_OR = torch.tensor([[0.0], [0.5], [0.0]], dtype=torch.float64) + 2 * first[:3, None]
    torch.testing.assert_close(part.a_RI.double(), a_RI, rtol=0, atol=2e-3)
    torch.testing.assert_close(part.b_OR.double(), 3 * b_OR, rtol=0, atol=2e-3)


def test_the_sums_are_derived_once_and_the_matrices_are_not_kept(site: Callable[..., Site]) -> None:
    base = site(out_features=3, in_features=4)
    derived = derive(RAW, tensors(), {base.path: base})
    shapes = {name: tuple(tensor.shape) for name, tensor in derived.items()}
    assert shapes == {f"derived.{PATH}.nola_A": (1, 4), f"derived.{PATH}.nola_B": (3, 1)}


def test_drawing_leaves_the_global_generator_alone(site: Callable[..., Site]) -> None:
    base, before = site(out_features=3, in_features=4), torch.get_rng_state()
    derive(RAW, tensors(), {base.path: base})
    assert torch.equal(torch.get_rng_state(), before)


def test_matrices_of_a_gpu_are_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedMethod, match=r"drawn_on='cuda' .*plain LORA"):
        method_for(RAW).parse({**RAW, "drawn_on": "cuda"})
    with pytest.raises(InvalidConfig, match="drawn_on"):
        method_for(RAW).parse({key: value for key, value in RAW.items() if key != "drawn_on"})


def test_more_draws_than_the_bound_are_refused_before_the_first() -> None:
    wide, count = Site(PATH, torch.empty(3, 2**20, device="meta"), None), 2**14
    given = tensors()
    given[f"{STEM}.lora_A.weight"] = torch.empty(1, 2**20, device="meta")
    given[f"{STEM}.lora_A.coefficients"] = torch.ones(count)
    with pytest.raises(InvalidConfig, match=r"random numbers are not drawn.*plain LORA"):
        derive({**RAW, "num_basis_A": count}, given, {PATH: wide})


def test_another_number_of_coefficients_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"coefficients: found shape \[2\], expected \[5\]"):
        compiled({**RAW, "num_basis_A": 5}, tensors(), site(out_features=3, in_features=4))
