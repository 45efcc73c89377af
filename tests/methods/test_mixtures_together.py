"""All mixtures of experts beside plain adapters and base rows in one batch of the real engine, each against
the tests' loop over its own tokens and experts, and a mixture of everything with chunks, copies and decoding.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.registry import methods, sites_of
from timbre_methods.routing import Routed
from timbre_server.operators.native.catalogue import why_not

needs_compiler = pytest.mark.skipif(why_not() is not None, reason="needs a C++ compiler")
PROMPT = [7, 12, 3, 44, 9, 21, 30, 5, 17, 28, 51]
OUTPUT_TOKENS = 4
PLAIN = ("lora", "ia3", "fourierft", "shira")
ALONE = ("xlora",)
"""Reads hidden states of the base: its crowd is in its own tests."""


def is_mixture(program: AdapterProgram) -> bool:
    return any(isinstance(part, Routed) for parts in program.sites.values() for part in parts)


@pytest.fixture
def expected_logprobs(
    evaluate: ModuleType, load_module: Callable[[Path], ModuleType]
) -> Callable[..., list[float]]:
    """Of each token after the first, by the tests' own copy of the model."""
    adapted_copy = load_module(Path(__file__).with_name("adapted_copy.py")).adapted_copy

    @torch.no_grad()
    def logprobs(model: nn.Module, program: AdapterProgram | None, token_ids: list[int]) -> list[float]:
        adapted = model if program is None else adapted_copy(evaluate, model, program)
        logits_TV: Tensor = adapted(torch.tensor([token_ids])).logits[0]
        logprobs_TV = torch.log_softmax(logits_TV[:-1].float(), -1)
        return logprobs_TV[torch.arange(len(token_ids) - 1), torch.tensor(token_ids[1:])].tolist()

    return logprobs


@pytest.mark.parametrize(
    ("budget", "kernels"),
    [(9, "torch"), (200, "torch"), pytest.param(200, "native", marks=needs_compiler)],
    ids=["in chunks", "at once", "in C++"],
)
def test_each_mixture_in_a_crowd_equals_the_loop_over_its_tokens(
    budget: int,
    kernels: str,
    llama: nn.Module,
    engine_bench: ModuleType,
    expected_logprobs: Callable[..., list[float]],
) -> None:
    bench: Any = engine_bench.EngineBench(llama, num_blocks=256, budget=budget, kernels=kernels)
    programs: dict[str, AdapterProgram | None] = {"": None}
    for number, (name, method) in enumerate(methods().items()):
        if name in PLAIN or (".routed." in type(method).__module__ and name not in ALONE):
            generator = torch.Generator().manual_seed(100 + number)
            config, tensors = method.example(sites_of(method, bench.sites), generator)
            program = bench.put(name, config, {key: smaller(tensor) for key, tensor in tensors.items()})
            if name in PLAIN or is_mixture(program):
                programs[name] = program
    asked = {
        bench.submit(PROMPT, name or None, num_tokens=OUTPUT_TOKENS, prompt_logprobs=0): name
        for name in programs
    }

    answers = bench.run()

    assert sum(name not in PLAIN for name in programs) > 8
    for request_id, name in asked.items():
        answer = answers[request_id]
        assert answer.error is None, name
        found = [*answer.prompt_logprobs, *answer.logprobs]
        expected = expected_logprobs(llama, programs[name], [*PROMPT, *answer.token_ids])
        assert found == pytest.approx(expected, abs=1e-3), name


def smaller(tensor: Tensor) -> Tensor:
    """Examples have values of unit variance, which would drive a whole model out of its range."""
    return tensor * 0.3 if tensor.is_floating_point() else tensor
