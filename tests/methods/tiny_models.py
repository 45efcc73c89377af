"""Tiny random models of the method tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY, HIDDEN, LAYERS, HEADS, LONGEST, STD = 61, 48, 2, 4, 64, 0.15
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 70,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
    "initializer_range": STD,
}
"""Of all families but GPT-2, which has names of its own; few are powers of two."""


def llama() -> LlamaForCausalLM:
    """Two layers, grouped-query attention, biases in the attention, sizes that are no powers of two."""
    return _llama(is_tied=False)


def tied_llama() -> LlamaForCausalLM:
    """The same, but its head multiplies by the embedding's table."""
    return _llama(is_tied=True)


def _llama(is_tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(11)
    config = LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=is_tied)
    return _with_random_biases(LlamaForCausalLM(config))


def plain_llama() -> LlamaForCausalLM:
    """Three layers without biases, as many key and value heads as query heads."""
    torch.manual_seed(14)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 3, "num_key_value_heads": HEADS})
    return LlamaForCausalLM(config).eval()


def mistral() -> MistralForCausalLM:
    """All layers see 8 tokens back."""
    torch.manual_seed(13)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()


def gpt2() -> GPT2LMHeadModel:
    """Two layers of `Conv1D`, all with biases."""
    torch.manual_seed(12)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LONGEST,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=STD,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _with_random_biases(GPT2LMHeadModel(config))


def gemma2() -> Gemma2ForCausalLM:
    """Scaled embeddings, tied; norms that multiply by 1 + w, with a w other than zero."""
    torch.manual_seed(13)
    config = Gemma2Config(**SIZES, head_dim=HIDDEN // HEADS, attn_implementation="eager")
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter.data, std=0.3)
    return model.eval()


_OF_EXPERTS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": None,
    "attn_implementation": "eager",
}


def qwen3_moe() -> Qwen3MoeForCausalLM:
    """Two layers with five experts each, whose matrices lie as [out, in]."""
    torch.manual_seed(14)
    config = Qwen3MoeConfig(**_OF_EXPERTS, head_dim=12, moe_intermediate_size=24, num_experts=5)
    return _with_clear_choices(Qwen3MoeForCausalLM(config))


def mixtral() -> MixtralForCausalLM:
    """The same with the whole width in each of four experts."""
    torch.manual_seed(15)
    return _with_clear_choices(MixtralForCausalLM(MixtralConfig(**_OF_EXPERTS, num_local_experts=4)))


def gpt_oss() -> GptOssForCausalLM:
    """Experts whose matrices lie as [in, out], with matrices of biases; attention sinks and a window."""
    torch.manual_seed(16)
    config = GptOssConfig(
        **_OF_EXPERTS,
        head_dim=12,
        num_local_experts=4,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return _with_clear_choices(GptOssForCausalLM(config))


def _with_clear_choices(model: Any) -> Any:
    """Random values everywhere, and routers that choose by more than rounding."""
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "sinks")):
            nn.init.normal_(parameter.data, std=0.2)
        elif name.endswith(("gate.weight", "router.weight")):
            nn.init.normal_(parameter.data, std=1.0)
    return model.eval()


def _with_random_biases(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter.data, std=0.2)
    return model.eval()
