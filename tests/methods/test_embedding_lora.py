"""LoRA and DoRA on embeddings and tied heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import LoraConfig
from torch import nn

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
