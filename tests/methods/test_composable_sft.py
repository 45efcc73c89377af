from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "COMPOSABLE_SFT"}
PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
BASE = Site(PATH, torch.arange(12.0).view(3, 4), torch.tensor([1.0, 2.0, 3.0]))


def compiled(given: dict[str, Tensor], base: Site = BASE) -> tuple[Any, ...]:
    check_adapter(RAW, given, {PATH: base})
    method = method_for(RAW)
    return method.compile(method.parse(RAW), given, {PATH: base}).sites[PATH]


def diff(parameter: str, steps: list[int]) -> dict[str, Tensor]:
    return {
        f"{STEM}.{parameter}_diff.values": torch.arange(1.0, len(steps) + 1),
        f"{STEM}.{parameter}_diff.index_steps": torch.tensor(steps, dtype=torch.int32),
    }


def decoded(steps: list[int], size: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The authors' decoding, in integers: the first dimension runs fastest."""
    places = []
    for flat in accumulate(steps):
        coordinates = []
        for length in size:
            coordinates.append(flat % length)
            flat //= length
        places.append(tuple(coordinates))
    return places


def test_steps_lead_down_the_columns(evaluate: Any) -> None:
    steps = [1, 1, 5, 4]
    places = decoded(steps, (3, 4))
    assert places == [(1, 0), (2, 0), (1, 2), (2, 3)]
    weight_OI = BASE.weight_OI.double()
    for value, place in enumerate(places, start=1):
        weight_OI[place] += value
    x_TI = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    assert BASE.bias_O is not None
    actual = evaluate.run_parts(BASE, compiled(diff("weight", steps)), x_TI)
    torch.testing.assert_close(actual, x_TI @ weight_OI.T + BASE.bias_O.double())


def test_a_diff_of_a_bias_is_a_shift() -> None:
    (rows,) = compiled(diff("bias", [0, 2]))
    assert (rows.gain.tolist(), rows.shift.tolist()) == ([1.0, 1.0, 1.0], [1.0, 0.0, 2.0])
    with pytest.raises(AdapterMismatch, match=r"bias_diff.values: this base's layer .*q_proj has no bias"):
        compiled(diff("bias", [0, 2]), Site(PATH, BASE.weight_OI, None))


@pytest.mark.parametrize(
    ("parameter", "steps", "problem"),
    [
        ("weight", [0, 12], "place 12, expected 0 to 11"),
        ("weight", [2, -3], "place -1, expected 0 to 11"),
        ("weight", [4, 0], r"place \(1, 1\) twice"),
        ("weight", [2**31 - 1, 2**31 - 1], "place 4294967294, expected 0 to 11"),
        ("bias", [0, 3], "channel 3, expected 0 to 2"),
        ("bias", [1, 0], "channel 1 twice"),
    ],
)
def test_impossible_places_are_refused(parameter: str, steps: list[int], problem: str) -> None:
    with pytest.raises(InvalidTensors, match=rf"{parameter}_diff.index_steps: found the {problem}"):
        compiled(diff(parameter, steps))


def test_more_values_than_places_are_refused() -> None:
    with pytest.raises(InvalidTensors, match="found 13 values, expected at most 12"):
        compiled(diff("weight", [1] * 13))


@pytest.mark.parametrize("module", ["model.norm", "model.embed_tokens"])
def test_diffs_of_what_is_not_linear_are_refused_by_name(module: str) -> None:
    given = {name.replace(PATH, module): tensor for name, tensor in diff("weight", [0, 1]).items()} | diff(
        "weight", [0, 1]
    )
    with pytest.raises(AdapterMismatch, match=f"{module}.weight_diff.*no linear layer '{module}'"):
        compiled(given)


def test_dense_heads_are_refused_by_name() -> None:
    given = {**diff("weight", [0, 1]), f"{STEM}.abs": torch.ones(3)}
    with pytest.raises(InvalidTensors, match=r"q_proj.abs' is surplus"):
        compiled(given)
