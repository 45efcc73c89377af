from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, derive, method_for

RAW = {"peft_type": "LOLDU", "lora_alpha": 6}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"

# W = P L D U with the pivots 4, -2, 3; the largest entry of the first column is in the last row.
PL = torch.tensor([[0.5, 1.0, 0.0], [0.25, 0.5, 1.0], [1.0, 0.0, 0.0]])
D = torch.tensor([4.0, -2.0, 3.0])
U = torch.tensor([[1.0, 2.0, -1.0, 0.5], [0.0, 1.0, 3.0, 2.0], [0.0, 0.0, 1.0, -1.0]])
BASE = Site("model.layers.0.self_attn.q_proj", PL @ D.diag() @ U, torch.ones(3))


def tensors(**own: list[float]) -> dict[str, Tensor]:
    given = {"vector_z": [1.0, 5.0], "scaling_factor": [2.0], **own}
    return {f"{STEM}.{key}": torch.tensor(value) for key, value in given.items()}


def delta(raw: dict[str, Any], given: dict[str, Tensor], evaluate: Any, base: Site = BASE) -> Tensor:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    whole = {**given, **derive(raw, given, sites)}
    parts = method.compile(method.parse(raw), whole, sites).sites[base.path]
    x_TI = torch.eye(base.in_features, dtype=torch.float64)
    return (evaluate.run_parts(base, parts, x_TI) - evaluate.run_parts(base, (), x_TI)).T


def test_z_and_the_scale_replace_the_first_pivots(evaluate: Any) -> None:
    # f_0 = 6 / 2 = 3; f z - f_0 d = (2 - 12, 10 + 6).
    expected_OI = -10.0 * PL[:, :1] @ U[:1] + 16.0 * PL[:, 1:2] @ U[1:2]
    torch.testing.assert_close(delta(RAW, tensors(), evaluate).float(), expected_OI)


def test_an_adapter_that_was_not_trained_changes_nothing(evaluate: Any) -> None:
    given = tensors(vector_z=[4.0, -2.0, 3.0], scaling_factor=[2.0])
    assert delta(RAW, given, evaluate).abs().max() < 1e-6


@pytest.mark.parametrize("start", ["uniform", "normal", "constant"])
def test_a_start_of_its_own_is_taken_off_the_base(evaluate: Any, start: str) -> None:
    raw, given = {**RAW, "init_method": start}, tensors(vector_z_start=[1.0, 1.0])
    expected_OI = -1.0 * PL[:, :1] @ U[:1] + 7.0 * PL[:, 1:2] @ U[1:2]
    torch.testing.assert_close(delta(raw, given, evaluate).float(), expected_OI)
    with pytest.raises(InvalidTensors, match=f"vector_z_start is missing: with init_method='{start}'"):
        delta(raw, tensors(), evaluate)


def test_a_start_beside_the_pivots_leaves_them_taken_off(evaluate: Any) -> None:
    raw = {**RAW, "init_method": "zeros"}
    torch.testing.assert_close(delta(raw, tensors(), evaluate), delta(RAW, tensors(), evaluate))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_any_shape_is_decomposed(site: Callable[..., Site], evaluate: Any, shape: tuple[int, int]) -> None:
    base = site(out_features=shape[0], in_features=shape[1])
    p_OO, l_OK, u_KI = torch.linalg.lu(base.weight_OI.double())
    d_K = torch.diagonal(u_KI)
    core_RR = torch.diag(torch.tensor([2.0, 10.0]) - 3 * d_K[:2])
    expected_OI = (p_OO @ l_OK)[:, :2] @ core_RR @ (u_KI / d_K[:, None])[:2]
    torch.testing.assert_close(delta(RAW, tensors(), evaluate, base), expected_OI, rtol=0, atol=1e-4)


def test_what_cannot_be_rebuilt_is_refused(evaluate: Any) -> None:
    with pytest.raises(InvalidTensors, match="scaling_factor is missing"):
        delta(RAW, {f"{STEM}.vector_z": torch.ones(2)}, evaluate)
    with pytest.raises(InvalidTensors, match="found 4 values, expected at most 3"):
        delta(RAW, tensors(vector_z=[1.0, 1, 1, 1]), evaluate)
    with pytest.raises(InvalidTensors, match="no LDU factors of rank 2"):
        delta(RAW, tensors(), evaluate, Site(BASE.path, torch.ones(3, 4), None))
    with pytest.raises(InvalidConfig, match="init_method"):
        method_for(RAW).parse({**RAW, "init_method": "kaiming"})
