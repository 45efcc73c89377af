"""What an encoder made of virtual tokens in training is all that the file holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import PromptEncoderConfig
from torch import nn


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_greedy_text_is_peft_s(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any, encoder: str
) -> None:
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=24,
        encoder_reparameterization_type=encoder,
    )
    written = write_with_peft(llama, config)
    assert list(written.tensors) == ["prompt_embeddings"]
    as_peft.serves(llama, written, budget=4)
