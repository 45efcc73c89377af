from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "SALT"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
SIGMA = torch.tensor([5.0, 4.0, 2.0, 1.0, 0.5])


GENERATOR = torch.Generator().manual_seed(3)
LEFT = torch.linalg.qr(torch.randn(6, 5, generator=GENERATOR)).Q
RIGHT = torch.linalg.qr(torch.randn(5, 5, generator=GENERATOR)).Q
BASE = Site("model.layers.0.self_attn.q_proj", LEFT @ SIGMA.diag() @ RIGHT, torch.ones(6))


def tensors() -> dict[str, Tensor]:
    own = {
        "trainable_scale_A": [2.0, -1.0],
        "trainable_shift_B": [0.5, 1.0],
        "trainable_X": [[1.0], [-2.0], [0.25]],
        "trainable_Y": [[-0.5, 1.0, 2.0]],
    }
    given = {f"{STEM}.{key}": torch.tensor(value) for key, value in own.items()}
    return {**given, f"{STEM}.U": LEFT.clone(), f"{STEM}.S": SIGMA.clone(), f"{STEM}.Vt": RIGHT.clone()}


def output(given: dict[str, Tensor], evaluate: Any) -> Tensor:
    sites, method = {BASE.path: BASE}, method_for(RAW)
    check_adapter(RAW, given, sites)
    parts = method.compile(method.parse(RAW), given, sites).sites[BASE.path]
    return evaluate.run_parts(BASE, parts, torch.eye(5, dtype=torch.float64))


def test_a_relu_cuts_the_whole_core(evaluate: Any) -> None:
    given = tensors()
    # 2 * 5 + 0.5 = 10.5; -4 + 1 = -3, cut; diag(2, 1, 0.5) + X Y, its negative entries cut.
    core_KK = torch.tensor(
        [
            [10.5, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 1.5, 1.0, 2.0],
            [0, 0, 1.0, 0, 0],
            [0, 0, 0, 0.25, 1.0],
        ]
    )
    adapted_OI = LEFT.double() @ core_KK.double() @ RIGHT.double()
    torch.testing.assert_close(output(given, evaluate), adapted_OI.T + 1, rtol=0, atol=1e-4)


def test_an_adapter_that_was_not_trained_changes_nothing(evaluate: Any) -> None:
    given = tensors()
    given |= {f"{STEM}.trainable_scale_A": torch.ones(2), f"{STEM}.trainable_shift_B": torch.zeros(2)}
    given[f"{STEM}.trainable_Y"] = torch.zeros(1, 3)
    expected_TO = BASE.weight_OI.double().T + 1
    torch.testing.assert_close(output(given, evaluate), expected_TO, rtol=0, atol=1e-5)


@pytest.mark.parametrize("missing", ["U", "S", "Vt"])
def test_the_vectors_that_it_was_trained_with_must_be_there(evaluate: Any, missing: str) -> None:
    given = tensors()
    del given[f"{STEM}.{missing}"]
    with pytest.raises(InvalidTensors, match=rf"\.{missing} is missing: .* save U, S and Vt"):
        output(given, evaluate)


def test_shapes_are_those_of_one_split(evaluate: Any) -> None:
    given = tensors()
    ones = {f"{STEM}.trainable_scale_A": torch.ones(3), f"{STEM}.trainable_shift_B": torch.ones(3)}
    with pytest.raises(InvalidTensors, match=r"trainable_X: found shape \[3, 1\], expected \[2, l\]"):
        output({**given, **ones}, evaluate)
    whole = {f"{STEM}.trainable_scale_A": torch.ones(5), f"{STEM}.trainable_shift_B": torch.ones(5)}
    with pytest.raises(InvalidTensors, match=r"trainable_X is surplus: all 5 singular values are scaled"):
        output({**given, **whole}, evaluate)
    with pytest.raises(InvalidTensors, match="found 6 values, expected at most 5"):
        output({**given, f"{STEM}.trainable_scale_A": torch.ones(6)}, evaluate)
