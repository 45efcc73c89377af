from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import FourierFTConfig
from torch import nn

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {"n_frequency": 60},
    "another seed": {"n_frequency": 60, "random_loc_seed": 20261},
    "another scale": {"n_frequency": 60, "scaling": 77.5},
    "one coefficient": {"n_frequency": 1, "scaling": 2000.0},
    "every place": {"n_frequency": 48 * 24, "target_modules": ["k_proj"]},
    "counts by layer": {"n_frequency": 40, "n_frequency_pattern": {"down_proj": 90, "0.self_attn.q_proj": 7}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fourierft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(
        llama, FourierFTConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options}), std=2.0
    )
