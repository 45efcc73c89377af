from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import DeloraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "lambda_pattern": {"q_proj": 2}, "delora_lambda": 30},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_delora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, DeloraConfig(target_modules=LAYERS, **options), std=3.0)


def test_delora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, DeloraConfig(r=4, target_modules=LAYERS), std=2.0)


RAW = {"peft_type": "DELORA", "r": 2, "delora_lambda": 15}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(base: Site, **replaced: Tensor) -> LowRank:
    given = {
        "A": torch.tensor([[3.0, 4, 0, 0, 0], [0, 0, 0, 0, 2]]),
        "B": torch.eye(6, 2),
        "lambda": torch.tensor([10.0]),
        "w_norm": torch.tensor([1.0, 2, 3, 4, 5]),
        **replaced,
    }
    method = method_for(RAW)
    named = {f"{STEM}.delora_{key}": t for key, t in given.items()}
    (part,) = method.compile(method.parse(RAW), named, {base.path: base}).sites[base.path]
    assert isinstance(part, LowRank)
    return part


def test_directions_strength_and_column_lengths_come_from_the_file(site: Callable[..., Site]) -> None:
    part = compiled(site())
    expected = torch.zeros(6, 5)
    expected[0, :2] = torch.tensor([5 * 0.6 * 1, 5 * 0.8 * 2])
    expected[1, 4] = 5 * 5
    torch.testing.assert_close(part.b_OR @ part.a_RI, expected)


def test_a_direction_of_no_length_is_no_change(site: Callable[..., Site]) -> None:
    part = compiled(site(), A=torch.zeros(2, 5))
    assert not (part.b_OR @ part.a_RI).any()
    assert part.b_OR.isfinite().all()


def test_a_rank_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"delora_A: found rank 3, the config says \[2\]"):
        compiled(site(), A=torch.ones(3, 5))
