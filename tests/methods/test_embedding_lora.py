"""LoRA and DoRA on embeddings and tied heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter

OPTIONS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "kept tied": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "beside layers": {
        "target_modules": ["embed_tokens", "q_proj"],
        "use_rslora": True,
        "alpha_pattern": {"embed_tokens": 5},
    },
}


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapted_embedding_gives_the_logits_of_peft(
    base: str,
    options: dict[str, Any],
    use_dora: bool,
    request: pytest.FixtureRequest,
    agrees_with_peft: Callable[..., None],
) -> None:
    config = LoraConfig(r=3, lora_alpha=6, use_dora=use_dora, **options)
    agrees_with_peft(request.getfixturevalue(base), config, std=0.1)


def test_an_adapted_embedding_of_gpt2_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(gpt2, LoraConfig(r=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True), std=0.2)


@pytest.mark.parametrize("base", ["llama", "gemma2"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_an_adapted_embedding_on_a_bf16_base_is_as_near_as_peft(
    base: str, use_dora: bool, request: pytest.FixtureRequest, agrees_in_bf16: Callable[..., None]
) -> None:
    config = LoraConfig(r=3, use_dora=use_dora, target_modules=["embed_tokens"])
    agrees_in_bf16(request.getfixturevalue(base), config, std=0.2)


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [1, 2]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {"beta": 1.0}},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("key", ["lora_embedding_A", "lora_embedding_B"])
def test_an_embeddings_factors_beside_a_linear_layers_are_refused(options: dict[str, Any], key: str) -> None:
    stem = "base_model.model.head"
    given = {
        f"{stem}.lora_A.weight": torch.ones(2, 6),
        f"{stem}.lora_B.weight": torch.ones(8, 2),
        f"{stem}.{key}": torch.ones(2, 2),
    }
    extras = {
        "dora": {f"{stem}.lora_magnitude_vector": torch.ones(8)},
        "kasa": {f"{stem}.lora_diag": torch.ones(2)},
    }
    given |= next((extras[name] for name in extras if VARIANTS[name] is options), {})
    sites = {"head": Site("head", torch.randn(8, 6), None)}
    with pytest.raises(InvalidTensors, match=rf"head\.{key} is (surplus: a linear layer has|not served)"):
        check_adapter({"peft_type": "LORA", "r": 2, **options}, given, sites)


@pytest.mark.parametrize("key", ["lora_A.weight", "lora_B.weight"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_linear_layers_factors_beside_an_embeddings_are_refused(kind: str, key: str) -> None:
    stem = "base_model.model.embed"
    given = {
        f"{stem}.lora_embedding_A": torch.ones(2, 9),
        f"{stem}.lora_embedding_B": torch.ones(4, 2),
        f"{stem}.{key}": torch.ones(2, 2),
    }
    if kind == "dora":
        given[f"{stem}.lora_magnitude_vector"] = torch.ones(4)
    sites = {"embed": Site("embed", torch.randn(9, 4).T, None, "embedding", is_transposed=True)}
    reason = rf"embed\.{key} is surplus: an embedding has lora_embedding_A and lora_embedding_B"
    with pytest.raises(InvalidTensors, match=reason):
        check_adapter({"peft_type": "LORA", "r": 2, **VARIANTS[kind]}, given, sites)
