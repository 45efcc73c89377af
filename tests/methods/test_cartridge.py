"""A trained KV cache in a prefix's place, through the real engine, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import CartridgeConfig
from torch import nn


@pytest.mark.parametrize("num_frozen", [0, 2])
def test_greedy_text_is_peft_s(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any, num_frozen: int
) -> None:
    config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, num_frozen_tokens=num_frozen)
    written = write_with_peft(llama, config, std=1.0)
    as_peft.serves(llama, written, budget=5)
