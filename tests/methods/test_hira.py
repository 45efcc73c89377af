from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
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


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
def test_hira_on_an_embedding_gives_the_logits_of_peft(
    base: str, request: pytest.FixtureRequest, agrees_with_peft: Callable[..., None]
) -> None:
    config = HiraConfig(r=3, target_modules=["embed_tokens", "v_proj"])
    agrees_with_peft(request.getfixturevalue(base), config, std=0.4)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_engine_gives_the_text_of_peft_with_an_adapted_embedding(
    family: str,
    request: pytest.FixtureRequest,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
) -> None:
    model = request.getfixturevalue(family)
    written = write_with_peft(model, HiraConfig(r=3, target_modules=["embed_tokens"]), std=0.6)
    bench = engine_bench.EngineBench(model, budget=4)
    bench.put("x", written.config, written.tensors)
    answer = bench.answer([7, 3, 20, 41, 5, 6], "x")
    tokens, logprobs = peft_greedy(model, written.folder, [7, 3, 20, 41, 5, 6], 8)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


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
    embedding = {f"{STEM}.hira_embedding_A": torch.ones(2, 9)}
    reason = r"hira_embedding_A is surplus: a linear layer has hira_A and hira_B"
    with pytest.raises(InvalidTensors, match=reason):
        method.compile(method.parse(RAW), {**tensors(2), **embedding}, {base.path: base})
