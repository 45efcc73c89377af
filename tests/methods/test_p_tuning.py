"""What an encoder made of virtual tokens in training is all that the file holds."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from peft import PromptEncoderConfig
from torch import nn

PROMPT = [7, 3, 20, 41]


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_greedy_text_is_peft_s(
    llama: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
    encoder: str,
) -> None:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=24,
        encoder_reparameterization_type=encoder,
    )
    written = write_with_peft(llama, config)
    assert list(written.tensors) == ["prompt_embeddings"]
    bench = engine_bench.EngineBench(llama, budget=4)
    bench.put("x", written.config, written.tensors)
    answer = bench.answer(PROMPT, "x")
    tokens, logprobs = peft_greedy(llama, written.folder, PROMPT, 8)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert tokens != bench.answer(PROMPT).token_ids
