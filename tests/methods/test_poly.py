from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from peft import PolyConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, method_for

LAYERS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]


@torch.no_grad()
def logits_of_task(model: nn.Module, folder: Any, token_ids: Tensor, task: int, quiet: Any) -> Tensor:
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
        found: Tensor = wrapped(token_ids, task_ids=torch.tensor([task] * len(token_ids))).logits
    return found


@pytest.mark.parametrize("n_splits", [1, 2])
def test_poly_gives_the_logits_of_peft_for_each_task(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
    quiet: Any,
    n_splits: int,
) -> None:
    config = PolyConfig(
        task_type="CAUSAL_LM", target_modules=LAYERS, r=3, n_tasks=3, n_skills=4, n_splits=n_splits
    )
    written, answers = write_with_peft(llama, config, std=0.8), []
    for task in range(3):
        expected = logits_of_task(llama, written.folder, token_ids, task, quiet)
        assert (expected - llama(token_ids).logits).abs().max() > 0.05

        of_task = replace(written, config={**written.config, "task_id": task})
        answers.append(timbre_logits(llama, of_task, token_ids))

        torch.testing.assert_close(answers[-1], expected, rtol=0, atol=1e-4)
    assert (answers[0] - answers[1]).abs().max() > 0.01


def test_one_task_needs_no_choice(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
    quiet: Any,
) -> None:
    written = write_with_peft(llama, PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    expected = logits_of_task(llama, written.folder, token_ids, 0, quiet)
    torch.testing.assert_close(timbre_logits(llama, written, token_ids), expected, rtol=0, atol=1e-4)


RAW: dict[str, Any] = {"peft_type": "POLY", "r": 2, "n_tasks": 3, "n_skills": 2, "task_id": 1}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.poly_"


def tensors() -> dict[str, Tensor]:
    return {
        STEM + "lora_A": torch.ones(1, 2, 5, 2),
        STEM + "lora_B": torch.ones(1, 2, 2, 6),
        STEM + "router.module_logits": torch.ones(3, 2),
    }


def test_a_task_is_one_plain_low_rank_change(site: Callable[..., Site]) -> None:
    base, method = site(), method_for(RAW)
    (part,) = method.compile(method.parse(RAW), tensors(), {base.path: base}).sites[base.path]
    assert isinstance(part, LowRank)
    assert part.a_RI.shape == (2, 5)


def test_several_tasks_without_a_choice_are_refused_with_what_to_write() -> None:
    raw = {key: value for key, value in RAW.items() if key != "task_id"}
    with pytest.raises(InvalidConfig, match=r"task_id is missing.* write \"task_id\", 0 to 2, into"):
        method_for(raw).parse(raw)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base = site()
    with pytest.raises(InvalidConfig, match="task_id: found 3, expected 0 to 2"):
        check_adapter({**RAW, "task_id": 3}, tensors(), {base.path: base})
    with pytest.raises(InvalidConfig, match="task_id"):
        check_adapter({**RAW, "task_id": -1}, tensors(), {base.path: base})
    with pytest.raises(InvalidTensors, match=r"features 5 and 6, expected multiples of n_splits, 2"):
        check_adapter({**RAW, "n_splits": 2}, tensors(), {base.path: base})
    with pytest.raises(InvalidTensors, match=r"module_logits: found shape \[3, 2\], expected \[4, 2\]"):
        check_adapter({**RAW, "n_tasks": 4}, tensors(), {base.path: base})
