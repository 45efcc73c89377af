from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HiraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Dense
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "init_weights": "gaussian"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hira_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, HiraConfig(target_modules=LAYERS, **options), std=0.3)


def test_hira_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    agrees_with_peft(gpt2, HiraConfig(r=3, target_modules=modules, fan_in_fan_out=True), std=0.3)


def test_hira_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, HiraConfig(r=4, target_modules=LAYERS), std=0.3)


RAW = {"peft_type": "HIRA", "r": 2}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(rank: int) -> dict[str, Tensor]:
    return {f"{STEM}.hira_A": torch.full((rank, 5), 0.5), f"{STEM}.hira_B": torch.ones(6, rank)}


def test_the_change_is_the_weight_times_the_product_and_the_weight_stays(site: Callable[..., Site]) -> None:
    base, method = site(), method_for(RAW)
    before = base.weight_OI.clone()
    (part,) = method.compile(method.parse(RAW), tensors(2), {base.path: base}).sites[base.path]
    assert isinstance(part, Dense)
    torch.testing.assert_close(part.delta_OI, before)
    assert torch.equal(base.weight_OI, before)


def test_what_hira_cannot_do_here_is_refused(site: Callable[..., Site]) -> None:
    base, method = site(), method_for(RAW)
    with pytest.raises(InvalidTensors, match=r"hira_A: found rank 3, the config says \[2\]"):
        method.compile(method.parse(RAW), tensors(3), {base.path: base})
    embedding = {"base_model.model.model.embed_tokens.hira_embedding_A": torch.ones(2, 9)}
    with pytest.raises(InvalidTensors, match=r"hira_embedding_A' is surplus"):
        method.compile(method.parse(RAW), {**tensors(2), **embedding}, {base.path: base})
