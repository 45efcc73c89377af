from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"init_r": 5, "lora_alpha": 8},
    "alpha is divided by the first rank": {
        "init_r": 4,
        "lora_alpha": 3,
        "rank_pattern": {
            f"{Q0}.lora_E": [True, False, False, True],
            "model.layers.1.mlp.up_proj.lora_E": [False, True, False, False],
        },
    },
    "no alpha: the rank that is left": {
        "init_r": 3,
        "lora_alpha": 0,
        "rank_pattern": {f"{Q0}.lora_E": [True, False, True]},
    },
    "options that PEFT does not look at": {
        "init_r": 3,
        "r": 8,
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 99},
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adalora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, AdaLoraConfig(total_step=9, target_modules=LAYERS, **options), std=0.5)


def test_adalora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = AdaLoraConfig(total_step=9, init_r=3, target_modules=modules, fan_in_fan_out=True)
    agrees_with_peft(gpt2, config, std=0.5)


def test_adalora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, AdaLoraConfig(total_step=9, init_r=4, target_modules=LAYERS), std=0.3)


RAW = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6, "total_step": 9}


def tensors(rank: int) -> dict[str, Tensor]:
    stem = f"base_model.model.{Q0}"
    return {
        f"{stem}.lora_A": torch.ones(rank, 5),
        f"{stem}.lora_B": torch.ones(6, rank),
        f"{stem}.lora_E": torch.full((rank, 1), 0.5),
    }


def compiled(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> AdapterProgram:
    method = method_for(raw)
    return method.compile(method.parse(raw), given, {base.path: base})


def test_a_layer_that_lost_every_rank_is_the_bases(site: Callable[..., Site]) -> None:
    raw = {**RAW, "rank_pattern": {f"{Q0}.lora_E": [False, False, False]}}
    assert compiled(raw, tensors(0), site()).sites == {}


def test_the_rank_must_be_the_one_that_the_pattern_leaves(site: Callable[..., Site]) -> None:
    raw = {**RAW, "rank_pattern": {f"{Q0}.lora_E": [True, False, True]}}
    assert set(compiled(raw, tensors(2), site()).sites) == {Q0}
    with pytest.raises(InvalidTensors, match=r"lora_A: found shape \[3, 5\], expected \[2, 5\]"):
        compiled(raw, tensors(3), site())
    with pytest.raises(InvalidTensors, match=r"lora_A: found shape \[2, 5\], expected \[3, 5\]"):
        compiled(RAW, tensors(2), site())


def test_what_adalora_does_not_have_is_refused() -> None:
    method = method_for(RAW)
    with pytest.raises(UnsupportedMethod, match="'lora_bias' is on"):
        method.parse({**RAW, "lora_bias": True})
    with pytest.raises(InvalidConfig, match="rank_pattern"):
        method.parse({**RAW, "rank_pattern": {f"{Q0}.lora_E": 3}})
