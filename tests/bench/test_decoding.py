"""Kernels of every kind decode what PyTorch's operators decode: every family alone, and all in one batch."""

from __future__ import annotations

import pytest
import torch
from engine_in_process import Decoding, distinct
from random_adapters import FAMILIES, Shapes, Tensors, lora
from transformers import LlamaConfig, LlamaForCausalLM

from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.native_linear import serves
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


def logprobs(decoding: Decoding, requests: list[tuple[str | None, list[int]]]) -> list[list[float]]:
    """Of what each request is answered at temperature 0, all of them at once."""
    core, sampling = decoding._core, SamplingParams(max_tokens=8, temperature=0, logprobs=1)
    found: dict[str, list[float]] = {}
    for number, (digest, prompt) in enumerate(requests):
        found[str(number)] = []
        core.submit(Submit(str(number), prompt, sampling, () if digest is None else (AdapterUse(digest),)))
    while core.has_work:
        for event in core.step().events:
            assert event.error_message is None
            found[event.request_id] += [token.logprob for token in event.logprobs]
    return list(found.values())


@pytest.mark.skipif(why_not() is not None or not serves(torch.float32), reason="needs C++ for all of it")
def test_an_answer_in_cpp_has_the_same_bits_alone_and_in_a_crowd() -> None:
    """Products, norms, attention and adapters sum a row's numbers in one order, whatever is beside it; shared
    bases do not, since few rows of them take another way."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
    names = [None, *(f"{name}-{number}" for name in MAKES if name != "vera" for number in (0, 1))]
    decoding = Decoding.of(model, MAKES, len(names), 16 << 20, "native")
    decoding.load([name for name in names if name])
    requests = [
        (name, torch.randint(CONFIG.vocab_size, (3 + 7 * number,)).tolist())
        for number, name in enumerate(names)
    ]
    together = logprobs(decoding, requests)
    assert [len(own) for own in together] == [8] * len(names)
    assert [logprobs(decoding, [request])[0] for request in requests] == together


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_in_triton_and_recorded() -> None:
    assert answers("triton", "cuda") == answers("torch", "cuda")
