from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import RoadConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "one for a pair": {"variant": "road_1", "group_size": 2},
    "one for an entry": {"variant": "road_2", "group_size": 2},
    "one for each part": {"variant": "road_4", "group_size": 2},
    "one for a pair, in groups": {"variant": "road_1", "group_size": 8},
    "one for an entry, in groups": {"variant": "road_2", "group_size": 6},
    "one for each part, in groups": {"variant": "road_4", "group_size": 8},
    "one for each part, in one group": {"variant": "road_4", "group_size": 24},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_road_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    layers = LAYERS if options["group_size"] == 2 else ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    agrees_with_peft(llama, RoadConfig(target_modules=layers, **options), std=0.8)


def test_road_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    config = RoadConfig(variant="road_2", group_size=8, target_modules=["q_proj", "down_proj"])
    agrees_in_bf16(llama, config, std=0.8)


RAW = {"peft_type": "ROAD", "variant": "road_1", "group_size": 4}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def adapted(raw: dict[str, Any], theta_P: Tensor, alpha_P: Tensor, base: Site) -> tuple[Any, ...]:
    method = method_for(raw)
    given = {f"{STEM}.road_theta": theta_P, f"{STEM}.road_alpha": alpha_P}
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


def test_a_quarter_turn_moves_one_half_of_each_group_to_the_other(
    site: Callable[..., Site], evaluate: Any
) -> None:
    base = site(out_features=8, bias=True)
    parts = adapted(RAW, torch.full((4,), math.pi / 2), torch.tensor([1.0, 2, 3, 4]), base)
    y0_O = base.bias_O
    expected_O = torch.tensor([-1.0, -2, 1, 2, -3, -4, 3, 4]) * y0_O[[2, 3, 0, 1, 6, 7, 4, 5]]
    torch.testing.assert_close(evaluate.run_parts(base, parts, torch.zeros(1, 5))[0], expected_O)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found 6 outputs, expected a multiple of .*group_size 4"):
        adapted(RAW, torch.zeros(3), torch.zeros(3), site())
    with pytest.raises(InvalidTensors, match=r"road_theta: found shape \[8\], expected \[4\]"):
        adapted(RAW, torch.zeros(8), torch.zeros(8), site(out_features=8))
    with pytest.raises(InvalidConfig, match="found group_size 3, expected an even number"):
        method_for(RAW).parse({**RAW, "group_size": 3})
    with pytest.raises(InvalidConfig, match="variant"):
        method_for(RAW).parse({**RAW, "variant": "road_3"})
