"""The same greedy text through the real engine as by PEFT: what tests of prompts and attention compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from timbre_methods.program import AdapterProgram

PROMPTS = [[7, 3, 20, 41], [9, 12, 6, 5, 17, 23, 30, 31, 2, 44, 51, 13, 8], [58]]


class AsPeft:
    """Serves adapters that PEFT wrote, and asserts that the answers are PEFT's."""

    def __init__(self, engine_bench: ModuleType, peft_greedy: Callable[..., Any]) -> None:
        self._engine_bench = engine_bench
        self._peft_greedy = peft_greedy

    def serves(
        self,
        model: nn.Module,
        written: Any,
        *,
        budget: int = 64,
        num_tokens: int = 8,
        **options: Any,
    ) -> AdapterProgram:
        """One adapter, all `PROMPTS` in a batch; ``budget`` rows in a step, and options of PEFT's forward.
        Its text must not be the base's."""
        bench = self._engine_bench.EngineBench(model, budget=budget)
        program: AdapterProgram = bench.put("x", written.config, written.tensors)
        ids = [bench.submit(prompt, "x", num_tokens) for prompt in PROMPTS]
        answers = bench.run()
        for prompt, request_id in zip(PROMPTS, ids, strict=True):
            tokens, logprobs = self._peft_greedy(model, written.folder, prompt, num_tokens, **options)
            assert answers[request_id].token_ids == tokens
            assert answers[request_id].logprobs == pytest.approx(logprobs, abs=1e-4)
            assert tokens != bench.answer(prompt, num_tokens=num_tokens).token_ids, "it must be heard"
        return program

    def serves_beside_the_base(
        self, model: nn.Module, written: Mapping[str, Any], num_blocks: int, budget: int, num_tokens: int
    ) -> None:
        """Several adapters and the base in one batch, in so little memory that requests are preempted."""
        bench = self._engine_bench.EngineBench(model, num_blocks=num_blocks, budget=budget, max_len=40)
        for name, each in written.items():
            bench.put(name, each.config, each.tensors)
        asked = [(prompt, name) for prompt in PROMPTS for name in (*written, None)]
        ids = [bench.submit(prompt, name, num_tokens) for prompt, name in asked]
        answers = bench.run()
        assert bench.num_preemptions > 0
        alone = self._engine_bench.EngineBench(model)
        for (prompt, name), request_id in zip(asked, ids, strict=True):
            if name is None:
                expected = alone.answer(prompt, num_tokens=num_tokens).token_ids
            else:
                expected = self._peft_greedy(model, written[name].folder, prompt, num_tokens)[0]
            assert answers[request_id].token_ids == expected, (prompt, name)

    def serves_in_bf16(self, model: nn.Module, written: Any) -> None:
        """The first token on a rounded base, to its rounding."""
        rounded = copy.deepcopy(model).to(torch.bfloat16)
        bench = self._engine_bench.EngineBench(rounded)
        bench.put("x", written.config, written.tensors)
        answer = bench.answer(PROMPTS[0], "x", num_tokens=1)
        expected = self._peft_greedy(rounded, written.folder, PROMPTS[0], 1)[1]
        assert answer.logprobs == pytest.approx(expected, abs=0.1)
