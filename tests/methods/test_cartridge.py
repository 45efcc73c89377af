"""A trained KV cache in a prefix's place, through the real engine, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from peft import CartridgeConfig
from torch import nn

PROMPT = [7, 3, 20, 41]


@pytest.mark.parametrize("num_frozen", [0, 2])
def test_greedy_text_is_peft_s(
    llama: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
    num_frozen: int,
) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, num_frozen_tokens=num_frozen)
    written = write_with_peft(llama, config, std=1.0)
    bench = engine_bench.EngineBench(llama, budget=5)
    bench.put("x", written.config, written.tensors)
    answer = bench.answer(PROMPT, "x")
    tokens, logprobs = peft_greedy(llama, written.folder, PROMPT, 8)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert tokens != bench.answer(PROMPT).token_ids
