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
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
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


def _with_random_biases(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter.data, std=0.2)
    return model.eval()
