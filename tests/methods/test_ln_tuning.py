from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LNTuningConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import compile_adapter

NORM = Site("model.norm", torch.tensor([1.0, 0.0, -2.0]), None, "norm")
RAW = {"peft_type": "LN_TUNING", "target_modules": ["norm"]}
WEIGHT = "base_model.model.model.norm.ln_tuning_layers.weight"


def test_norms_of_a_llama_give_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(llama, LNTuningConfig(task_type="CAUSAL_LM"))


def test_norms_that_multiply_by_one_plus_w_give_the_logits_of_peft(
    gemma2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    names = ["input_layernorm", "post_feedforward_layernorm", "norm"]
    agrees_with_peft(gemma2, LNTuningConfig(target_modules=names))


def test_norms_with_biases_and_other_layers_give_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(gpt2, LNTuningConfig(target_modules=["ln_1", "ln_f"]))
    agrees_with_peft(gpt2, LNTuningConfig(target_modules=["ln_2", "attn.c_proj", "c_fc"]), std=0.1)


def test_norms_on_a_bf16_base_are_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, LNTuningConfig(task_type="CAUSAL_LM"))


def test_a_weight_of_zero_in_the_base_is_replaced_like_any_other(evaluate: Any) -> None:
    weight = torch.tensor([0.5, 3.0, 0.0])
    program = compile_adapter(RAW, {WEIGHT: weight}, {NORM.path: NORM})
    x_TI = torch.randn(4, 3)
    y_TO = evaluate.run_parts(NORM, program.sites[NORM.path], x_TI)
    torch.testing.assert_close(y_TO, x_TI * weight)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({WEIGHT: torch.ones(4)}, r"norm\.ln_tuning_layers\.weight: found shape \[4\], expected \[3\]"),
        ({WEIGHT.replace("weight", "bias"): torch.ones(3)}, r"ln_tuning_layers\.weight is missing"),
        (
            {WEIGHT: torch.ones(3), WEIGHT.replace("weight", "bias"): torch.ones(3)},
            r"ln_tuning_layers\.bias is surplus: this layer of the base has no bias",
        ),
    ],
)
def test_a_layer_that_is_not_whole_is_refused(tensors: Mapping[str, Tensor], message: str) -> None:
    with pytest.raises(InvalidTensors, match=message):
        compile_adapter(RAW, tensors, {NORM.path: NORM})


def test_a_bias_that_the_base_has_must_be_there() -> None:
    norm = replace(NORM, bias_O=torch.ones(3))
    with pytest.raises(InvalidTensors, match=r"ln_tuning_layers\.bias is missing"):
        compile_adapter(RAW, {WEIGHT: torch.ones(3)}, {norm.path: norm})
