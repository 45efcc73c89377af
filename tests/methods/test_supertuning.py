from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import SupertuningConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import LowRank, Sparse
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "super": {"sparsity": 0.9},
    "smallest weights": {"sparsity": 0.9, "select_top": False},
    "supra": {"sparsity": 0.95, "r": 3},
    "supra with an alpha": {"sparsity": 0.95, "r": 4, "lora_alpha": 3.0, "lora_dropout": 0.1},
    "a tenth of an eighth": {"sparsity": 0.9875, "target_modules": ["v_proj", "down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_supertuning_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, SupertuningConfig(**{"target_modules": LAYERS, **options}))


@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
@pytest.mark.parametrize("select_top", [True, False])
def test_left_out_indices_are_found_as_peft_finds_them(
    llama: nn.Module, agrees_with_peft: Callable[..., None], select_top: bool
) -> None:
    config = SupertuningConfig(
        sparsity=0.97, r=2, select_top=select_top, save_precomputed_indices=False, target_modules=LAYERS
    )
    agrees_with_peft(llama, config)


def test_supertuning_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, SupertuningConfig(sparsity=0.95, r=2, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "SUPERTUNING", "sparsity": 0.85}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
WEIGHT_OI = torch.tensor([[0.5, -4.0, 0.25, 1.0, 0.0], [2.0, -0.75, 8.0, -16.0, 3.0]])
BASE = Site("model.layers.0.self_attn.q_proj", WEIGHT_OI, None)
"""Ten different magnitudes in a 2 x 5 layer."""


def compiled(given: dict[str, Tensor], raw: dict[str, Any], base: Site = BASE) -> tuple[Any, ...]:
    sites = {base.path: base}
    check_adapter(raw, given, sites)
    method = method_for(raw)
    return method.compile(method.parse(raw), {**given, **derive(raw, given, sites)}, sites).sites[base.path]


def dense(part: Sparse) -> list[list[float]]:
    delta_OI = torch.zeros(len(part.row_ends) - 1, part.in_features)
    for row, (start, end) in enumerate(zip(part.row_ends[:-1], part.row_ends[1:], strict=True)):
        delta_OI[row, part.columns_N[start:end].long()] = part.values_N[start:end]
    return delta_OI.tolist()


def test_values_go_to_the_largest_weights_in_the_order_of_their_magnitude() -> None:
    raw = {**RAW, "sparsity": 0.7, "save_precomputed_indices": False}
    (part,) = compiled({f"{STEM}.supertuning_values": torch.tensor([1.0, 2.0, 3.0])}, raw)
    assert dense(part) == [[0, 3, 0, 0, 0], [0, 0, 2, 1, 0]]
    (part,) = compiled(
        {f"{STEM}.supertuning_values": torch.tensor([1.0, 2.0, 3.0])}, {**raw, "select_top": False}
    )
    assert dense(part) == [[3, 0, 2, 0, 1], [0, 0, 0, 0, 0]]


def test_indices_in_the_file_need_not_be_the_largest_nor_sorted() -> None:
    given = {
        f"{STEM}.supertuning_values": torch.tensor([1.0, 2.0, 3.0]),
        f"{STEM}.supertuning_indices": torch.tensor([7, 0, 4], dtype=torch.int32),
    }
    (part,) = compiled(given, {**RAW, "sparsity": 0.7})
    assert dense(part) == [[2, 0, 0, 0, 3], [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("twin", [8, 1], ids=["within the chosen", "at the edge"])
def test_equal_magnitudes_cannot_be_told_apart(twin: int) -> None:
    weight_OI = WEIGHT_OI.clone()
    weight_OI[0, 0] = -weight_OI.flatten()[twin]
    raw = {**RAW, "sparsity": 0.6, "save_precomputed_indices": False}
    given = {f"{STEM}.supertuning_values": torch.ones(4)}
    if twin == 8:
        weight_OI[1, 0] = 0.0  # so that the fourth and the fifth largest are the twins
        weight_OI[0, 3] = 0.125
    with pytest.raises(
        InvalidTensors, match=r"1 of the base's magnitudes .* tie, .*save_precomputed_indices"
    ):
        compiled(given, raw, Site(BASE.path, weight_OI, None))


def test_a_low_rank_part_without_an_alpha_is_doubled() -> None:
    given = {
        f"{STEM}.supertuning_values": torch.ones(1),
        f"{STEM}.supertuning_indices": torch.zeros(1, dtype=torch.int32),
        f"{STEM}.supertuning_lora_A.weight": torch.ones(2, 5),
        f"{STEM}.supertuning_lora_B.weight": torch.ones(2, 2),
    }
    _, factors = compiled(given, {**RAW, "r": 2})
    assert isinstance(factors, LowRank)
    assert factors.b_OR.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    _, factors = compiled(given, {**RAW, "r": 2, "lora_alpha": 3})
    assert factors.b_OR.tolist() == [[1.5, 1.5], [1.5, 1.5]]
    with pytest.raises(InvalidTensors, match=r"lora_A.weight is surplus: the config says r=null"):
        compiled(given, RAW)
    with pytest.raises(InvalidTensors, match=r"found shape \[2, 5\], expected \[3, 5\]"):
        compiled(given, {**RAW, "r": 3})


@pytest.mark.parametrize(
    ("indices", "problem"),
    [([0, 10], "the place 10, expected 0 to 9"), ([-1, 3], "the place -1"), ([7, 7], r"\(1, 2\) twice")],
)
def test_impossible_places_are_refused(indices: list[int], problem: str) -> None:
    given = {
        f"{STEM}.supertuning_values": torch.ones(2),
        f"{STEM}.supertuning_indices": torch.tensor(indices, dtype=torch.int32),
    }
    with pytest.raises(InvalidTensors, match=rf"supertuning_indices: found .*{problem}"):
        compiled(given, {**RAW, "sparsity": 0.75})


def test_values_are_counted_in_floats_as_peft_counts_them() -> None:
    given = {f"{STEM}.supertuning_values": torch.ones(1)}
    with pytest.raises(InvalidTensors, match=r"found 1 values, the config says 0 \(sparsity 0.9 of 2 x 5\)"):
        compiled(given, {**RAW, "sparsity": 0.9, "save_precomputed_indices": False})
    with pytest.raises(InvalidTensors, match=r"found 1 values, the config says 2"):
        compiled(given, {**RAW, "sparsity": 0.75, "save_precomputed_indices": False})


def test_indices_that_the_config_denies_are_surplus() -> None:
    given = {
        f"{STEM}.supertuning_values": torch.ones(1),
        f"{STEM}.supertuning_indices": torch.zeros(1, dtype=torch.int32),
    }
    with pytest.raises(InvalidTensors, match=r"supertuning_indices is surplus"):
        compiled(given, {**RAW, "save_precomputed_indices": False})


def test_an_alpha_without_a_rank_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="lora_alpha: expected null without an r"):
        method_for(RAW).parse({**RAW, "lora_alpha": 4})
