"""Kernels of every kind decode what PyTorch's operators decode: every family alone, and all in one batch."""

from __future__ import annotations

import pytest
import torch
from engine_in_process import Decoding, distinct
from random_adapters import FAMILIES, Shapes, Tensors, lora
from transformers import LlamaConfig, LlamaForCausalLM

from timbre_server.engine.options import KernelChoice
from timbre_server.operators.native.catalogue import why_not

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
)  # fmt: skip
ROWS = 9


def lora_of_16_bits(shapes: Shapes) -> tuple[dict[str, object], Tensors]:
    config, tensors = lora(shapes)
    return config, {name: tensor.bfloat16() for name, tensor in tensors.items()}


MAKES = {**FAMILIES, "half": lora_of_16_bits}


def answers(kernels: KernelChoice, device: str) -> dict[str, list[list[int]]]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(device).eval().requires_grad_(False)
    decoding = Decoding.of(model, MAKES, ROWS, 16 << 20, kernels)
    crowds = {name: distinct(name, ROWS) for name in MAKES}
    mixed: list[str | None] = [None, *(f"{name}-{number}" for number, name in enumerate(MAKES))]
    found = {}
    for name, digests in {"base": distinct(None, ROWS), **crowds, "all": mixed}.items():
        decoding.load([digest for digest in digests if digest])
        torch.manual_seed(1)
        found[name] = decoding.greedy_tokens(digests, prompt_tokens=5, steps=12)
    return found


@pytest.mark.skipif(why_not() is not None, reason="needs a C++ compiler")
def test_in_cpp() -> None:
    found = answers("native", "cpu")
    assert found == answers("torch", "cpu")
    assert all(found[name] != found["base"] for name in MAKES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_triton_and_recorded() -> None:
    assert answers("triton", "cuda") == answers("torch", "cuda")
