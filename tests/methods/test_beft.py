from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import BeftConfig
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")
@pytest.mark.parametrize("layers", [["q_proj", "v_proj"], LAYERS], ids=["with biases", "all"])
def test_beft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], layers: list[str]
) -> None:
    agrees_with_peft(llama, BeftConfig(target_modules=layers))


def test_beft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, BeftConfig(target_modules=["q_proj", "o_proj"]))


def test_a_shift_of_another_length_is_refused(site: Callable[..., Site]) -> None:
    base, raw = site(), {"peft_type": "BEFT"}
    tensors = {"base_model.model.model.layers.0.self_attn.q_proj.beft_bias": torch.zeros(1, 5)}
    with pytest.raises(InvalidTensors, match=r"found shape \[1, 5\], expected \[1, 6\]"):
        method_for(raw).compile(method_for(raw).parse(raw), tensors, {base.path: base})
