from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import IA3Config
from torch import nn

OPTIONS = {
    "as in the paper": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "inputs only": {
        "target_modules": ["q_proj", "up_proj"],
        "feedforward_modules": ["q_proj", "up_proj"],
    },
    "outputs only": {"target_modules": ["o_proj", "q_proj"], "feedforward_modules": []},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ia3_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(llama, IA3Config(task_type="CAUSAL_LM", **options))
