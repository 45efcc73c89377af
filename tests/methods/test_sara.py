from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, derive, method_for

RAW = {"peft_type": "SARA", "threshold": 0.5}
PATH = "model.layers.0.self_attn.q_proj"
NAME = f"base_model.model.{PATH}.sara_values"
WEIGHT_OI = torch.tensor([[0.25, -2.0, -0.5], [0.0, -0.125, 4.0]])
BASE = Site(PATH, WEIGHT_OI, None)


def compiled(values: list[float], base: Site = BASE, raw: dict[str, Any] = RAW) -> tuple[Any, ...]:
    given: dict[str, Tensor] = {NAME: torch.tensor(values)}
    check_adapter(raw, given, {PATH: base})
    method = method_for(raw)
    tensors = {**given, **derive(raw, given, {PATH: base})}
    return method.compile(method.parse(raw), tensors, {PATH: base}).sites[PATH]


def test_new_values_replace_small_weights_row_by_row(evaluate: Any) -> None:
    new = torch.tensor([[9.0, -2.0, -0.5], [8.0, 7.0, 4.0]], dtype=torch.float64)
    x_TI = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]], dtype=torch.float64)
    actual = evaluate.run_parts(BASE, compiled([9.0, 8.0, 7.0]), x_TI)
    torch.testing.assert_close(actual, x_TI @ new.T)


def test_a_weight_at_the_threshold_is_not_below_it() -> None:
    (part,) = compiled([1.0, 1.0, 1.0])
    assert part.columns_N.tolist() == [0, 0, 1]
    assert part.values_N.tolist() == [0.75, 1.0, 1.125]


@pytest.mark.parametrize("count", [2, 4])
def test_another_number_of_small_weights_is_another_base(count: int) -> None:
    with pytest.raises(
        InvalidTensors, match=rf"found {count} values, expected 3: .* threshold 0.5; .*very base"
    ):
        compiled([1.0] * count)


def test_magnitudes_are_compared_in_the_bases_own_dtype() -> None:
    nearly = Site(PATH, torch.tensor([[0.4999, 1.0, 2.0]]), None)
    assert len(compiled([1.0], nearly)[0].values_N) == 1
    rounded = Site(PATH, nearly.weight_OI.bfloat16(), None)
    with pytest.raises(InvalidTensors, match="found 1 values, expected 0"):
        compiled([1.0], rounded)


@pytest.mark.parametrize("threshold", [0, -1.0, float("inf"), "0.5", None])
def test_a_threshold_is_a_positive_number(threshold: object) -> None:
    with pytest.raises(InvalidConfig, match="threshold"):
        method_for(RAW).parse({**RAW, "threshold": threshold})
    with pytest.raises(InvalidConfig, match="threshold"):
        method_for(RAW).parse({"peft_type": "SARA"})
