from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
BASE = Site(PATH, torch.arange(15.0).view(3, 5), torch.tensor([1.0, 2.0, 3.0]))

# As the fork writes it.
RAW: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": "tiny",
    "candidate_reselection_proportion": 0.2,
    "candidate_reselection_steps": None,
    "density": 0.01,
    "dtype": "float32",
    "inference_mode": True,
    "initial_reselection_rate": 0.2,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "num_deltas": {PATH: 3, "model.layers.1.self_attn.q_proj": 7},
    "num_tunable_weights": None,
    "peft_type": "SFT",
    "reselection_steps": 20,
    "revision": None,
    "selection_accumulation_steps": 5,
    "selection_algorithm": "rigl",
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
}


def tensors(cells: list[int], dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    return {
        f"{STEM}.sft_delta.values": torch.arange(1.0, len(cells) + 1),
        f"{STEM}.sft_delta.indices": torch.tensor(cells, dtype=dtype),
    }


def compiled(given: dict[str, Tensor], raw: dict[str, Any] = RAW) -> dict[str, Any]:
    check_adapter(raw, given, {PATH: BASE})
    method = method_for(raw)
    return dict(method.compile(method.parse(raw), given, {PATH: BASE}).sites)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cells", [[0, 6, 14], [14, 0, 6]])
def test_cells_are_flat_row_major_and_in_any_order(
    cells: list[int], dtype: torch.dtype, evaluate: Any
) -> None:
    weight_OI = BASE.weight_OI.double()
    for value, cell in enumerate(cells, start=1):
        weight_OI[cell // 5, cell % 5] += value
    x_TI = torch.tensor([[1.0, -2.0, 0.5, 3.0, 0.25]], dtype=torch.float64)
    bias_O = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    expected = x_TI @ weight_OI.T + bias_O
    actual = evaluate.run_parts(BASE, compiled(tensors(cells, dtype))[PATH], x_TI)
    torch.testing.assert_close(actual, expected)


def test_a_layer_without_deltas_is_not_adapted() -> None:
    assert compiled(tensors([]), {**RAW, "num_deltas": {PATH: 0}}) == {}


def test_without_num_deltas_the_tensors_count() -> None:
    (part,) = compiled(tensors([3, 4]), {**RAW, "num_deltas": None})[PATH]
    assert part.columns_N.tolist() == [3, 4]


def test_the_number_of_values_is_the_configs() -> None:
    with pytest.raises(InvalidTensors, match=r"indices: found shape \[2\], expected \[3\]"):
        compiled(tensors([3, 4]))
    with pytest.raises(InvalidTensors, match="num_deltas does not name this layer"):
        compiled(tensors([3, 4, 5]), {**RAW, "num_deltas": {"q_proj": 3}})
    with pytest.raises(InvalidConfig, match="num_deltas"):
        method_for(RAW).parse({**RAW, "num_deltas": {PATH: -1}})


@pytest.mark.parametrize(
    ("cells", "problem"),
    [([0, 15, 2], "place 15, expected 0 to 14"), ([0, -1, 2], "place -1"), ([8, 1, 8], r"\(1, 3\) twice")],
)
def test_impossible_cells_are_refused(cells: list[int], problem: str) -> None:
    with pytest.raises(InvalidTensors, match=rf"sft_delta.indices: found the .*{problem}"):
        compiled(tensors(cells))
