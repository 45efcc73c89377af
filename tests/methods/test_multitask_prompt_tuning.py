"""One prompt times a task's factor, the task being named by the config."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import MultitaskPromptTuningConfig
from torch import nn

from timbre_methods.errors import InvalidConfig
from timbre_methods.registry import method_for

PROMPT = [9, 12, 6, 5, 17, 23, 30]


def config_of(tasks: int) -> MultitaskPromptTuningConfig:
    return MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_ranks=2, num_tasks=tasks
    )


def test_greedy_text_is_peft_s(llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any) -> None:
    written = write_with_peft(llama, config_of(1), std=0.8)
    as_peft.serves(llama, written, budget=4, task_ids=torch.tensor([0]))


def test_each_of_several_tasks_is_an_adapter_as_in_peft(
    llama: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
) -> None:
    written = write_with_peft(llama, config_of(3), std=0.8)
    bench = engine_bench.EngineBench(llama, budget=4)
    texts = []
    for task in range(3):
        bench.put(f"task {task}", {**written.config, "task_id": task}, written.tensors)
        answer = bench.answer(PROMPT, f"task {task}")
        tokens, logprobs = peft_greedy(llama, written.folder, PROMPT, 8, task_ids=torch.tensor([task]))
        assert answer.token_ids == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
        texts.append(tuple(tokens))
    assert len(set(texts)) == 3


def test_several_tasks_without_the_number_of_one_are_refused(
    llama: nn.Module, write_with_peft: Callable[..., Any]
) -> None:
    written = write_with_peft(llama, config_of(3))
    with pytest.raises(InvalidConfig, match=r"task_id is missing.*3 tasks.*write \"task_id\", 0 to 2"):
        method_for(written.config).parse(written.config)
    with pytest.raises(InvalidConfig, match="task_id: found 3, expected 0 to 2"):
        method_for(written.config).parse({**written.config, "task_id": 3})
    for wrong in (-1, True, "1", 1.5):
        with pytest.raises(InvalidConfig, match="task_id"):
            method_for(written.config).parse({**written.config, "task_id": wrong})
