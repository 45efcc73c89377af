from __future__ import annotations

from collections.abc import Callable

import pytest
from peft import LoraConfig
from torch import nn

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "fractional alpha": {"r": 3, "lora_alpha": 1.5},
    "rank pattern": {"r": 4, "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 7}},
    "alpha pattern": {"r": 4, "alpha_pattern": {"q_proj": 1, "^model.layers.0.self_attn.k_proj": 20}},
    "alpha expression": {"r": 4, "alpha_pattern": {r"layers\.[01]\.(mlp|x).*": 2, ".*_proj": 16}},
    "lora bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "with the head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "a regex": {"r": 2, "target_modules": r".*layers\.1.*_proj"},
    "some layers": {"r": 2, "layers_to_transform": [0]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, std=0.2, save_embedding_layers=False)
