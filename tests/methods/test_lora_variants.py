"""BD-LoRA, and the variants of PEFT's LORA that are plain LoRA at inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig, VeloraConfig
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import method_for

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": BdLoraConfig(["o_proj"], ["q_proj", "k_proj"], nblocks=2, match_strict=False)},
    "velora": {"velora_config": VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "eva": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], variant: str
) -> None:
    agrees_with_peft(llama, LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, **VARIANTS[variant]))


def test_what_training_left_is_surplus_without_its_option(site: Callable[..., Site]) -> None:
    base = site()
    stem = f"base_model.model.{base.path}"
    given = {
        f"{stem}.lora_A.weight": torch.ones(2, 5),
        f"{stem}.lora_B.weight": torch.ones(6, 2),
        f"{stem}.lora_velora_embed": torch.ones(3),
    }
    raw = {"peft_type": "LORA", "r": 2, "velora_config": {"num_groups": 1}}
    method = method_for(raw)
    assert set(method.compile(method.parse(raw), given, {base.path: base}).sites) == {base.path}
    raw["velora_config"] = None
    with pytest.raises(InvalidTensors, match="lora_velora_embed' is surplus"):
        method.compile(method.parse(raw), given, {base.path: base})


def test_blocks_that_do_not_reach_are_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=6, in_features=8)
    stem = f"base_model.model.{base.path}"
    given = {f"{stem}.lora_A.weight": torch.ones(4, 3), f"{stem}.lora_B.weight": torch.ones(6, 4)}
    raw = {"peft_type": "LORA", "r": 4, "use_bdlora": {"nblocks": 2}}
    method = method_for(raw)
    with pytest.raises(InvalidTensors, match=r"found shape \[4, 3\], expected \[4, 8\], or 2 blocks"):
        method.compile(method.parse(raw), given, {base.path: base})
