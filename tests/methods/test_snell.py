from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Dense, Sparse
from timbre_methods.registry import check_adapter, inspect_adapter, method_for
from timbre_methods.sparse.snell import ROWS_AT_ONCE

PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"


def raw(threshold: float) -> dict[str, Any]:
    return {"peft_type": "SNELL", "threshold": threshold}


def points(out_features: int, in_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        f"{STEM}.snell_in": 9 * torch.randn(2, in_features, 3, generator=generator),
        f"{STEM}.snell_out": 9 * torch.randn(2, out_features, 3, generator=generator),
    }


def compiled(given: dict[str, Tensor], threshold: float, out_features: int, in_features: int) -> Any:
    base = Site(PATH, torch.zeros(out_features, in_features), None)
    check_adapter(raw(threshold), given, {PATH: base})
    method = method_for(raw(threshold))
    (part,) = method.compile(method.parse(raw(threshold)), given, {PATH: base}).sites[PATH]
    return part


def kernel(given: dict[str, Tensor]) -> list[list[float]]:
    """K entry by entry, in Python's floats."""
    q, p = given[f"{STEM}.snell_in"].tolist(), given[f"{STEM}.snell_out"].tolist()
    return [
        [0.1 * (math.dist(p[0][o], q[0][i]) - math.dist(p[1][o], q[1][i])) for i in range(len(q[0]))]
        for o in range(len(p[0]))
    ]


def survivors(k: list[list[float]], threshold: float) -> list[list[float]]:
    """The released sparsification: what is above the interpolated quantile, times its own magnitude."""
    ordered = sorted(abs(entry) for row in k for entry in row)
    at = threshold * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    edge = low + (high - low) * (at - math.floor(at))
    return [[entry * abs(entry) if abs(entry) > edge else 0.0 for entry in row] for row in k]


def test_without_a_threshold_the_kernel_itself_is_the_change() -> None:
    given = points(4, 6)
    part = compiled(given, 0.0, 4, 6)
    assert isinstance(part, Dense)
    torch.testing.assert_close(part.delta_OI, torch.tensor(kernel(given)))


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.8, 23 / 24])
def test_survivors_are_multiplied_by_their_own_magnitude(threshold: float, evaluate: Any) -> None:
    given = points(5, 5)
    part = compiled(given, threshold, 5, 5)
    assert isinstance(part, Sparse if threshold > 0.9 else Dense)
    expected = torch.tensor(survivors(kernel(given), threshold))
    actual = evaluate.change(part, torch.eye(5), torch.zeros(5, 5)).T
    torch.testing.assert_close(actual, expected)


def test_what_equals_the_quantile_does_not_survive(evaluate: Any) -> None:
    given = points(5, 5)
    given[f"{STEM}.snell_out"][:] = given[f"{STEM}.snell_out"][:, :1].clone()
    expected = torch.tensor(survivors(kernel(given), 0.5))
    part = compiled(given, 0.5, 5, 5)
    torch.testing.assert_close(evaluate.change(part, torch.eye(5), torch.zeros(5, 5)).T, expected)
    assert int((expected != 0).sum()) == 10


def test_the_bytes_are_known_without_the_values() -> None:
    header = {f"{STEM}.snell_in": ("F32", [2, 50, 3]), f"{STEM}.snell_out": ("F32", [2, 40, 3])}
    base = {PATH: Site(PATH, torch.empty(40, 50, device="meta"), None)}
    assert inspect_adapter(raw(0.0), header, base).prepared_bytes == 4 * 2000
    assert inspect_adapter(raw(0.95), header, base).prepared_bytes == 8 * 100 + 8 * 41


def test_rows_are_made_in_pieces_without_a_seam() -> None:
    given = points(ROWS_AT_ONCE + 2, 3)
    part = compiled(given, 0.0, ROWS_AT_ONCE + 2, 3)
    torch.testing.assert_close(part.delta_OI, torch.tensor(kernel(given)))


def test_points_of_different_dimensions_are_refused() -> None:
    given = points(4, 6)
    given[f"{STEM}.snell_out"] = torch.ones(2, 4, 2)
    with pytest.raises(InvalidTensors, match=r"snell_out: found shape \[2, 4, 2\], expected \[2, 4, 3\]"):
        compiled(given, 0.5, 4, 6)


def test_points_of_endless_dimensions_are_refused() -> None:
    header = {f"{STEM}.snell_in": ("F32", [2, 6, 513]), f"{STEM}.snell_out": ("F32", [2, 4, 513])}
    base = {PATH: Site(PATH, torch.empty(4, 6, device="meta"), None)}
    with pytest.raises(InvalidTensors, match="found 513 dimensions, expected at most 512"):
        inspect_adapter(raw(0.0), header, base)


def test_a_layer_too_large_to_rank_is_refused() -> None:
    header = {f"{STEM}.snell_in": ("F32", [2, 4096, 1]), f"{STEM}.snell_out": ("F32", [2, 4097, 1])}
    base = {PATH: Site(PATH, torch.empty(4097, 4096, device="meta"), None)}
    with pytest.raises(InvalidTensors, match="found a layer of 16781312 weights with a threshold"):
        inspect_adapter(raw(0.5), header, base)
