from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import DeftConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {"r": 4},
    "qr": {"r": 4, "decomposition_method": "qr"},
    "alpha": {"r": 4, "alpha": 6},
    "alpha of 0 counts as none": {"r": 4, "alpha": 0, "decomposition_method": "qr"},
    "the rank is capped by the outputs, in alpha too": {"r": 30, "alpha": 6, "decomposition_method": "qr"},
    "para": {"r": 4, "para": True},
    "para with qr": {"r": 4, "para": True, "decomposition_method": "qr"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_deft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, DeftConfig(target_modules=LAYERS, **options), std=0.2)


@pytest.mark.parametrize("method", ["relu", "qr"])
def test_deft_on_conv1d_gives_the_logits_of_peft(
    method: str, gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    options = {"decomposition_method": method, "target_modules": modules}
    agrees_with_peft(gpt2, DeftConfig(r=3, fan_in_fan_out=True, **options), std=0.2)


def test_deft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, DeftConfig(r=4, target_modules=LAYERS), std=0.2)


RAW = {"peft_type": "DEFT", "r": 2}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.deft_P": torch.randn(6, 2, generator=generator),
        f"{STEM}.deft_R": torch.randn(2, 5, generator=generator),
    }


def compiled(given: dict[str, Tensor], base: Site, **options: Any) -> LowRank:
    raw, method = {**RAW, **options}, method_for(RAW)
    sites = {base.path: base}
    completed = {**given, **derive(raw, given, sites)}
    (part,) = method.compile(method.parse(raw), completed, sites).sites[base.path]
    assert isinstance(part, LowRank)
    return part


def test_what_is_put_in_follows_the_signs_of_q(site: Callable[..., Site]) -> None:
    """Q Qᵀ does not depend on them, Q R does: they are the ones of Householder's reflections."""
    base, given = site(), tensors()
    part = compiled(given, base, decomposition_method="qr")
    p_OR = given[f"{STEM}.deft_P"]
    q_O = -p_OR[:, 0] / p_OR[:, 0].norm() * p_OR[0, 0].sign()
    torch.testing.assert_close(part.b_OR[:, 0], q_O)
    torch.testing.assert_close(part.a_RI[0], given[f"{STEM}.deft_R"][0] - q_O @ base.weight_OI)


def test_q_is_derived_once_and_belongs_to_no_file(site: Callable[..., Site]) -> None:
    base = site()
    raw = {**RAW, "decomposition_method": "qr"}
    derived = derive(raw, tensors(), {base.path: base})
    assert {name: t.shape for name, t in derived.items()} == {f"derived.{base.path}.deft_Q": (6, 2)}
    assert derive(RAW, tensors(), {base.path: base}) == {}
    with pytest.raises(InvalidTensors, match="are the server's own"):
        derive(raw, {**tensors(), **derived}, {base.path: base})


def test_a_factor_that_para_leaves_out_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"deft_R is surplus: the config says para=true"):
        compiled(tensors(), site(), para=True)
    with pytest.raises(InvalidTensors, match=r"deft_R is missing"):
        compiled({f"{STEM}.deft_P": tensors()[f"{STEM}.deft_P"]}, site())


def test_a_decomposition_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="decomposition_method"):
        method_for(RAW).parse({**RAW, "decomposition_method": "svd"})
