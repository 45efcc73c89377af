from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "SPT"}
PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
BASE = Site(PATH, torch.arange(6.0).view(2, 3), torch.tensor([0.5, -0.5]))
SPARSE = {f"{STEM}.spt_values": torch.tensor([1.0, 2.0]), f"{STEM}.spt_indices": torch.tensor([5, 1])}
PAIR = {
    f"{STEM}.spt_lora_A": torch.tensor([[1.0, 0.0, 2.0]]),
    f"{STEM}.spt_lora_B": torch.tensor([[3.0], [4.0]]),
}
SHIFT = {f"{STEM}.spt_lora_bias": torch.tensor([10.0, 20.0])}


def compiled(given: dict[str, Tensor], **options: Any) -> tuple[Any, ...]:
    raw = {**RAW, **options}
    check_adapter(raw, given, {PATH: BASE})
    method = method_for(raw)
    return method.compile(method.parse(raw), given, {PATH: BASE}).sites[PATH]


@pytest.mark.parametrize(
    ("given", "delta", "shift"),
    [
        (SPARSE, [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]], [0.0, 0.0]),
        (PAIR, [[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]], [0.0, 0.0]),
        ({**PAIR, **SHIFT}, [[3.0, 0.0, 6.0], [4.0, 0.0, 8.0]], [10.0, 20.0]),
        ({**SPARSE, **PAIR}, [[3.0, 2.0, 6.0], [4.0, 0.0, 9.0]], [0.0, 0.0]),
    ],
    ids=["sparse", "low rank", "low rank with a bias", "both"],
)
def test_a_layer_has_sparse_values_or_a_pair_or_both(
    given: dict[str, Tensor], delta: list[list[float]], shift: list[float], evaluate: Any
) -> None:
    x_TI = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]], dtype=torch.float64)
    weight_OI = BASE.weight_OI.double() + torch.tensor(delta, dtype=torch.float64)
    expected = x_TI @ weight_OI.T + torch.tensor([0.5, -0.5]).double() + torch.tensor(shift).double()
    torch.testing.assert_close(
        evaluate.run_parts(BASE, compiled(given, lora_bias=any(shift)), x_TI), expected
    )


@pytest.mark.parametrize("missing", ["spt_values", "spt_indices", "spt_lora_A", "spt_lora_B"])
def test_half_a_pair_is_refused(missing: str) -> None:
    given = {name: t for name, t in {**SPARSE, **PAIR}.items() if not name.endswith(missing)}
    with pytest.raises(InvalidTensors, match=f"{missing} is missing"):
        compiled(given)


def test_a_bias_is_there_where_the_config_says_so() -> None:
    with pytest.raises(InvalidTensors, match="spt_lora_bias is surplus: the config says lora_bias=false"):
        compiled({**PAIR, **SHIFT})
    with pytest.raises(InvalidTensors, match="spt_lora_bias is missing"):
        compiled(PAIR, lora_bias=True)


def test_impossible_places_are_refused() -> None:
    with pytest.raises(InvalidTensors, match="spt_indices: found the place 6, expected 0 to 5"):
        compiled({**SPARSE, f"{STEM}.spt_indices": torch.tensor([5, 6])})
    with pytest.raises(InvalidTensors, match=r"spt_indices: found the place \(1, 2\) twice"):
        compiled({**SPARSE, f"{STEM}.spt_indices": torch.tensor([5, 5])})
    with pytest.raises(InvalidTensors, match="spt_values: found 7 values, expected at most 6"):
        compiled({f"{STEM}.spt_values": torch.ones(7), f"{STEM}.spt_indices": torch.arange(7)})
