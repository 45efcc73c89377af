"""What X-LoRA's config may say, and its experts' configs in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from timbre_methods.errors import InvalidConfig, MethodError, UnsupportedMethod
from timbre_methods.registry import method_for

EXPERT = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}
CONFIG: dict[str, Any] = {
    "peft_type": "XLORA",
    "hidden_size": 16,
    "adapters": {"0": EXPERT, "1": {**EXPERT, "use_rslora": True}, "2": {**EXPERT, "r": 4}},
}


def test_what_the_refused_ones_change_is_served() -> None:
    method_for(CONFIG).parse(CONFIG)


REFUSED: dict[str, tuple[dict[str, Any], type[MethodError], str]] = {
    "another first pass": ({"scaling_pass_value": 0.3}, UnsupportedMethod, "'scaling_pass_value' is on"),
    "a path": (
        {"adapters": {"0": "./expert"}},
        InvalidConfig,
        "expert 0 is the path './expert'",
    ),
    "another name": ({"adapters": {"first": {"peft_type": "LORA"}}}, InvalidConfig, "found the name 'first'"),
    "an expert of another kind": ({"adapters": {"0": {"peft_type": "IA3"}}}, InvalidConfig, "found 'IA3'"),
    "too few experts": ({"top_k_lora": 4}, InvalidConfig, "top_k_lora: found 4, expected at most 3"),
}
NOT_OF_AN_EXPERT = {"use_dora": True, "lora_bias": True, "bias": "all", "init_lora_weights": "pissa"}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_a_config_that_is_not_served_is_refused_by_name(
    case: tuple[dict[str, Any], type[MethodError], str],
) -> None:
    changes, error, text = case
    config = {**CONFIG, **changes}
    with pytest.raises(error, match=text):
        method_for(config).parse(config)


@pytest.mark.parametrize("option", sorted(NOT_OF_AN_EXPERT))
def test_an_experts_option_that_is_not_served_is_refused_by_name(option: str) -> None:
    config = copy.deepcopy(CONFIG)
    config["adapters"]["1"][option] = NOT_OF_AN_EXPERT[option]
    with pytest.raises(UnsupportedMethod, match=rf"expert 1: .*{option}.*not served"):
        method_for(config).parse(config)
