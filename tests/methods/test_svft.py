from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, derive, method_for

RAW = {"peft_type": "SVFT"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.svft_layer"
GATE = math.log(3.0)
"""sigmoid(log 3) = 3/4"""


def tensors(
    values: list[float], rows: list[int] | None = None, columns: list[int] | None = None
) -> dict[str, Tensor]:
    given = {f"{STEM}.s": torch.tensor(values), f"{STEM}.gate": torch.tensor([GATE])}
    if rows is not None:
        given |= {f"{STEM}.s_row": torch.tensor(rows), f"{STEM}.s_col": torch.tensor(columns)}
    return given


def with_basis(given: dict[str, Tensor], base: Site) -> dict[str, Tensor]:
    u_OK, _, v_KI = torch.linalg.svd(base.weight_OI, full_matrices=False)
    return {**given, f"{STEM}.u": u_OK, f"{STEM}.v": v_KI.contiguous()}


def delta(given: dict[str, Tensor], base: Site, evaluate: Any, raw: dict[str, Any] = RAW) -> Tensor:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    whole = {**given, **derive(raw, given, sites)}
    parts = method.compile(method.parse(raw), whole, sites).sites[base.path]
    x_TI = torch.eye(base.in_features, dtype=torch.float64)
    return (evaluate.run_parts(base, parts, x_TI) - evaluate.run_parts(base, (), x_TI)).T


@pytest.mark.parametrize("in_file", [True, False])
def test_the_plain_pattern_moves_singular_values(
    site: Callable[..., Site], evaluate: Any, in_file: bool
) -> None:
    base = site()
    u_OK, _, v_KI = torch.linalg.svd(base.weight_OI.double(), full_matrices=False)
    values = [4.0, 0.0, -8.0, 1.0, 2.0]
    given = with_basis(tensors(values), base) if in_file else tensors(values)
    expected_OI = u_OK @ torch.tensor([3.0, 0.0, -6.0, 0.75, 1.5], dtype=torch.float64).diag() @ v_KI
    torch.testing.assert_close(delta(given, base, evaluate), expected_OI, rtol=0, atol=1e-5)


def test_values_go_to_their_rows_and_columns_and_equal_places_add(
    site: Callable[..., Site], evaluate: Any
) -> None:
    base = site()
    given = with_basis(tensors([4.0, 8.0, -4.0, 1.0], [0, 3, 3, 1], [2, 1, 1, 1]), base)
    core_KK = torch.zeros(5, 5)
    core_KK[0, 2], core_KK[3, 1], core_KK[1, 1] = 3.0, 3.0, 0.75
    expected_OI = given[f"{STEM}.u"] @ core_KK @ given[f"{STEM}.v"]
    torch.testing.assert_close(delta(given, base, evaluate).float(), expected_OI, rtol=0, atol=1e-5)


def test_a_flipped_sign_of_the_files_own_vectors_is_followed(
    site: Callable[..., Site], evaluate: Any
) -> None:
    base = site()
    given = with_basis(tensors([4.0], [0], [2]), base)
    flipped = {**given, f"{STEM}.v": -given[f"{STEM}.v"]}
    torch.testing.assert_close(delta(flipped, base, evaluate), -delta(given, base, evaluate))


def test_values_off_the_diagonal_need_the_vectors_they_were_trained_with(
    site: Callable[..., Site], evaluate: Any
) -> None:
    with pytest.raises(InvalidTensors, match=r"svft_layer\.u is missing: .* whose signs .* save u and v"):
        delta(tensors([4.0], [0], [2]), site(), evaluate)


@pytest.mark.parametrize("option", [{"rank": 4}, {"fill_orthonormal": True}])
def test_a_truncated_rank_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedMethod, match="a part of the base is lost"):
        method_for(RAW).parse({**RAW, **option})


def test_tensors_that_do_not_fit_are_refused(site: Callable[..., Site], evaluate: Any) -> None:
    base = site()
    with pytest.raises(InvalidTensors, match="found 4 values, expected the 5 of the diagonal"):
        delta(tensors([1.0] * 4), base, evaluate)
    with pytest.raises(InvalidTensors, match=r"s_col: found 5, expected 0 to 4"):
        delta(with_basis(tensors([1.0, 1.0], [0, 1], [5, 0]), base), base, evaluate)
    short = with_basis(tensors([1.0], [0], [0]), base)
    short[f"{STEM}.u"] = short[f"{STEM}.u"][:, :4].contiguous()
    with pytest.raises(InvalidTensors, match=r"u: found shape \[6, 4\], expected \[6, 5\]"):
        delta(short, base, evaluate)
