from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "LQ_LORA", "r": 2, "lora_alpha": 6}
PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


L1_OS, L2_SI = random(5, 2, seed=1), random(2, 7, seed=2)
A_RI, B_OR = random(2, 7, seed=3), random(5, 2, seed=4)


def tensors(a_RI: Tensor = A_RI, b_OR: Tensor = B_OR) -> dict[str, Tensor]:
    return {
        f"{STEM}.lora_A.weight": a_RI,
        f"{STEM}.lora_B.weight": b_OR,
        f"{STEM}.lq_L1": L1_OS,
        f"{STEM}.lq_L2": L2_SI,
    }


def compiled(given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(RAW, given, {PATH: base})
    method = method_for(RAW)
    return method.compile(method.parse(RAW), given, {PATH: base}).sites[PATH]


def test_it_is_the_trained_pair_over_what_the_split_left(evaluate: Any) -> None:
    """The paper's layer, Q x + s B A x, on a base that its split gives exactly."""
    q_OI, x_TI = random(5, 7, seed=5).double(), random(4, 7, seed=6).double()
    base = Site(PATH, q_OI + L1_OS.double() @ L2_SI.double(), None)
    expected = x_TI @ q_OI.T + 6 / 2 * (x_TI @ A_RI.double().T) @ B_OR.double().T
    actual = evaluate.run_parts(base, compiled(tensors(), base), x_TI)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_the_pair_at_its_start_changes_nothing() -> None:
    root = math.sqrt(6 / 2)
    (factors,) = compiled(tensors(L2_SI / root, L1_OS / root), Site(PATH, random(5, 7, seed=5), None))
    assert factors.a_RI.shape == (4, 7)
    assert (factors.b_OR @ factors.a_RI).abs().max() < 1e-6


def test_the_rank_is_the_configs() -> None:
    base = Site(PATH, random(5, 7, seed=5), None)
    with pytest.raises(InvalidTensors, match=r"lora_A.weight: found shape \[3, 7\], expected \[2, 7\]"):
        compiled(tensors(random(3, 7, seed=3), random(5, 3, seed=4)), base)
    with pytest.raises(InvalidTensors, match=r"lq_L2: found shape \[2, 7\], expected \[1, 7\]"):
        compiled({**tensors(), f"{STEM}.lq_L1": L1_OS[:, :1].contiguous()}, base)
