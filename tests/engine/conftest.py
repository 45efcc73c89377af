"""Tiny random models of the served families, and one engine turn after another without sockets or adapters.

Weights are drawn wide, so that the most likely token is clear and depends on the whole context.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 131
WINDOW = 8
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_SLIDING = {"sliding_window": WINDOW, "head_dim": 8}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SHARED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHARED, **_SLIDING),
    "qwen2": lambda: Qwen2Config(**_SHARED),
    "qwen3": lambda: Qwen3Config(**_SHARED, head_dim=16),
    "gemma2": lambda: Gemma2Config(
        **_SHARED, **_SLIDING, attn_logit_softcapping=5.0, final_logit_softcapping=10.0, layer_types=_LAYERS
    ),
    "gemma3": lambda: Gemma3TextConfig(**_SHARED, **_SLIDING, layer_types=_LAYERS),
    "phi3": lambda: Phi3Config(**_SHARED),
    "phi": lambda: PhiConfig(**_SHARED, partial_rotary_factor=0.5),
    "cohere": lambda: CohereConfig(**_SHARED, logit_scale=1.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_SHARED, head_dim=16, moe_intermediate_size=20, num_experts=6, num_experts_per_tok=2
    ),
    "mixtral": lambda: MixtralConfig(**_SHARED, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: GptOssConfig(
        **_SHARED,
        **_SLIDING,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=_LAYERS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}


def build_tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.eval().requires_grad_(False)
    return model


@pytest.fixture
def tiny_model() -> Callable[[str], PreTrainedModel]:
    """A new model of a family in `FAMILIES`, with transformers' own attention, float32."""
    return lambda family: build_tiny_model(FAMILIES[family]())


@pytest.fixture
def model_of() -> Callable[[PreTrainedConfig], PreTrainedModel]:
    """A new model of any configuration."""
    return build_tiny_model


@pytest.fixture(scope="session")
def stand_ins(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The runner and the adapters that play a part in tests of the loop; real parts, but for the model."""
    return load_module(Path(__file__).with_name("stand_ins.py"))
