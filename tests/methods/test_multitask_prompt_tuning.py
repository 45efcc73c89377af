"""One prompt times a task's factor; only where there is one task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig
from torch import nn

from timbre_methods.errors import UnsupportedMethod
from timbre_methods.registry import method_for


def config_of(tasks: int) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_ranks=2, num_tasks=tasks
    )


def test_greedy_text_is_peft_s(llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any) -> None:
    written = write_with_peft(llama, config_of(1), std=0.8)
    as_peft.serves(llama, written, budget=4, task_ids=torch.tensor([0]))


def test_several_tasks_are_refused(llama: nn.Module, write_with_peft: Callable[..., Any]) -> None:
    written = write_with_peft(llama, config_of(3))
    with pytest.raises(UnsupportedMethod, match=r"num_tasks=3.*which task"):
        method_for(written.config).parse(written.config)
