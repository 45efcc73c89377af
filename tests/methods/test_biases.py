"""Trained biases, which PEFT writes beside a method's own tensors."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, compile_adapter, derive

SITES = {"q": Site("q", torch.eye(4), torch.zeros(4))}
LORA = {"peft_type": "LORA", "r": 1}


@pytest.mark.parametrize(
    ("base", "config"),
    [
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="lora_only")),
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", use_dora=True)),
        ("gpt2", peft.LoraConfig(r=2, target_modules=["c_attn"], bias="all", fan_in_fan_out=True)),
        ("llama", peft.HRAConfig(r=2, target_modules=["q_proj"], bias="hra_only")),
        ("llama", peft.FourierFTConfig(n_frequency=9, target_modules=["k_proj"], bias="all")),
        (
            "gpt2",
            peft.LoraConfig(
                r=2,
                target_modules=["c_attn"],
                bias="all",
                fan_in_fan_out=True,
                modules_to_save=["ln_f", "1.mlp"],
            ),
        ),
        ("llama", peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", modules_to_save=["o_proj"])),
        ("llama", peft.MissConfig(r=2, target_modules=["q_proj"], bias="MiSS_only")),
    ],
    ids=[
        "adapted layers",
        "dora",
        "norms too",
        "hra",
        "fourierft",
        "saved norm and block",
        "saved layer",
        "miss",
    ],
)
def test_trained_biases_give_the_logits_of_peft(
    base: str, config: peft.PeftConfig, request: pytest.FixtureRequest, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(request.getfixturevalue(base), config)


def test_a_bias_needs_its_option_and_a_layer_that_has_one() -> None:
    given = {
        "base_model.model.q.lora_A.weight": torch.ones(1, 4),
        "base_model.model.q.lora_B.weight": torch.ones(4, 1),
        "base_model.model.q.base_layer.bias": torch.ones(4),
    }
    program = compile_adapter({**LORA, "bias": "lora_only"}, given, SITES)
    assert torch.equal(program.sites["q"][-1].shift, torch.ones(4))
    with pytest.raises(InvalidTensors, match='train with bias="none"'):
        compile_adapter(LORA, given, SITES)
    with pytest.raises(InvalidConfig, match="bias"):
        compile_adapter({**LORA, "bias": "some"}, given, SITES)
    bare = {"q": Site("q", torch.eye(4), None)}
    with pytest.raises(InvalidTensors, match="this layer of the base has no bias"):
        compile_adapter({**LORA, "bias": "all"}, given, bare)


def test_a_bias_beside_a_method_that_scales_it_is_refused() -> None:
    given = {
        "base_model.model.q.ia3_l": torch.ones(4, 1),
        "base_model.model.q.base_layer.bias": torch.ones(4),
    }
    with pytest.raises(InvalidTensors, match="ia3 changes what the base's own bias adds"):
        compile_adapter({"peft_type": "IA3", "bias": "all"}, given, SITES)


SAVED = {
    "base_model.model.q.lora_A.weight": torch.ones(1, 4),
    "base_model.model.q.lora_B.weight": torch.ones(4, 1),
    "base_model.model.k.weight": torch.ones(4, 4),
    "base_model.model.k.bias": torch.ones(4),
    "base_model.model.k.modules_to_save.bias": torch.ones(4),
    "base_model.model.k.original_module.bias": torch.zeros(4),
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"modules_to_save.bias": torch.zeros(4)}, InvalidTensors, r"found other values than k\.bias has"),
        ({"original_module.bias": torch.ones(4)}, AdapterMismatch, "found other values than this base has"),
        ({"original_module.bias": torch.ones(5)}, InvalidTensors, r"found shape \[5\], expected \[4\]"),
        ({"bias": None}, InvalidTensors, r"k\.bias is missing, while the file holds .*modules_to_save"),
    ],
)
def test_the_bias_of_a_saved_module_may_be_repeated_and_nothing_else(
    changed: dict[str, Tensor | None], error: type[Exception], message: str
) -> None:
    sites = {**SITES, "k": Site("k", torch.eye(4), torch.zeros(4))}
    raw = {**LORA, "bias": "all"}
    assert derive(raw, SAVED, sites) == {}
    assert check_adapter(raw, SAVED, sites).parameters == 8 + 16 + 4
    changed = {**SAVED, **{f"base_model.model.k.{key}": tensor for key, tensor in changed.items()}}
    with pytest.raises(error, match=message):
        derive(raw, {name: tensor for name, tensor in changed.items() if tensor is not None}, sites)
    with pytest.raises(InvalidTensors, match=r"k\.modules_to_save\.bias' is surplus"):
        compile_adapter({**LORA, "bias": "lora_only"}, SAVED, sites)
