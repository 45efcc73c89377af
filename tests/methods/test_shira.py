from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import ShiraConfig
from torch import nn

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "options", [{"r": 1}, {"r": 4, "random_seed": 9}, {"r": 2, "target_modules": ["k_proj"]}]
)
def test_shira_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(llama, ShiraConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options}))
