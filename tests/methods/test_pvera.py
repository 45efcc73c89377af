from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PveraConfig
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.registry import method_for

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not (save|load) p?vera_A and:UserWarning")

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "saved": {"r": 6},
    "regenerated": {"r": 6, "save_projection": False},
    "another seed": {"r": 5, "save_projection": False, "projection_prng_key": 3},
    "a seed for training": {"r": 3, "generator_seed": 5, "target_modules": ["k_proj", "down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_pvera_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, PveraConfig(**{"target_modules": LAYERS, **options}), std=1.0)


def test_pvera_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = PveraConfig(r=4, target_modules=modules, fan_in_fan_out=True, save_projection=False)
    agrees_with_peft(gpt2, config, std=0.5)


def test_pvera_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, PveraConfig(r=6, target_modules=LAYERS), std=0.3)


RAW = {"peft_type": "PVERA", "r": 2, "save_projection": False}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_log_variances_do_nothing(site: Callable[..., Site]) -> None:
    base, method = site(), method_for(RAW)
    given = {f"{STEM}.pvera_lambda_b": torch.ones(6), f"{STEM}.pvera_lambda_d": torch.arange(4.0)}
    [part] = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    assert part.core.tolist() == [[0.0, 1.0]]
    assert part.basis.p_NPI.shape == (1, 2, 5)


def test_a_mean_without_its_log_variance_is_refused(site: Callable[..., Site]) -> None:
    base, method = site(), method_for(RAW)
    given = {f"{STEM}.pvera_lambda_b": torch.ones(6), f"{STEM}.pvera_lambda_d": torch.ones(2)}
    with pytest.raises(InvalidTensors, match=r"pvera_lambda_d: found shape \[2\], expected \[4\]"):
        method.compile(method.parse(RAW), given, {base.path: base})


def test_sampling_is_refused_with_the_reason() -> None:
    with pytest.raises(UnsupportedMethod, match=r"'sample_at_inference' is on.*how often the layers ran"):
        method_for(RAW).parse({**RAW, "sample_at_inference": True})
