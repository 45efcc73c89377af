from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeanutConfig
from torch import Tensor, nn
from transformers.activations import ACT2FN

from timbre_methods.base_products import ROWS_AT_ONCE
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.low_rank.activations import ACTIVATIONS
from timbre_methods.program import LowRank
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "no hidden layers": {"r": 4},
    "one": {"r": 4, "depth": 1, "act_fn": "gelu", "scaling": 0.5},
    "three: the last encoder's input first": {"r": 3, "depth": 3, "act_fn": "tanh"},
    "parameters at their first values": {"r": 4, "depth": 1, "act_fn": "prelu"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_peanut_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, PeanutConfig(target_modules=LAYERS, **options), std=0.4)


def test_peanut_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, PeanutConfig(r=4, depth=1, target_modules=LAYERS), std=0.3)


def test_there_is_every_function_that_peft_accepts() -> None:
    assert sorted(ACTIVATIONS) == sorted(ACT2FN)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_a_function_is_the_public_one(name: str) -> None:
    x = torch.cat([torch.linspace(-20, 20, 801), torch.tensor([0.0, -1e-7, 1e-7])])
    with torch.no_grad():
        expected = ACT2FN[name](x)
    torch.testing.assert_close(ACTIVATIONS[name](x), expected, atol=2e-6, rtol=2e-6)


RAW = {"peft_type": "PEANUT", "r": 2, "depth": 1}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(out_features: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.peanut_A.weight": torch.randn(2, out_features, generator=generator) / 8,
        f"{STEM}.peanut_B.weight": torch.randn(out_features, 2, generator=generator),
        f"{STEM}.peanut_encoders.0.weight": torch.randn(2, 2, generator=generator),
        f"{STEM}.peanut_decoders.0.weight": torch.randn(2, 2, generator=generator),
    }


def compiled(given: dict[str, Tensor], base: Site, **options: Any) -> LowRank:
    method = method_for(RAW)
    (part,) = method.compile(method.parse({**RAW, **options}), given, {base.path: base}).sites[base.path]
    assert isinstance(part, LowRank)
    return part


def test_the_network_sees_a_tall_weight_without_a_seam(site: Callable[..., Site]) -> None:
    out_features = 2 * ROWS_AT_ONCE + 3
    base, given = site(out_features=out_features), tensors(out_features)
    a, _, e, d = given.values()
    h = torch.tanh(a @ base.weight_OI)
    expected = torch.tanh(d @ torch.tanh(e @ h)) + h
    torch.testing.assert_close(compiled(given, base, act_fn="tanh").a_RI, expected, atol=1e-4, rtol=1e-4)


def test_the_depth_must_be_the_configs(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"peanut_encoders.0.weight' is surplus"):
        compiled(tensors(), site(), depth=0)
    with pytest.raises(InvalidTensors, match=r"peanut_encoders.1.weight is missing"):
        compiled(tensors(), site(), depth=2)


def test_a_function_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(UnsupportedMethod, match=r"act_fn='softmax' is not served; there are gelu, gelu_10"):
        method_for(RAW).parse({**RAW, "act_fn": "softmax"})
