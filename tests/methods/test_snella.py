"""SNELLA against its formula in Python's floats, entry by entry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, Sparse
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
ALPHA, GAMMA, BETA = 2.0, 0.7, -0.3


def raw(threshold: float) -> dict[str, Any]:
    return {"peft_type": "SNELLA", "thresholds": {PATH: threshold, "elsewhere": 0.1}}


def tensors(out_features: int, in_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        f"{STEM}.snell_in": 9 * torch.randn(2, in_features, 3, generator=generator),
        f"{STEM}.snell_out": 9 * torch.randn(2, out_features, 3, generator=generator),
        f"{STEM}.snella_alpha": torch.tensor([ALPHA]),
        f"{STEM}.snella_gamma": torch.tensor([GAMMA]),
        f"{STEM}.snella_beta": torch.tensor([BETA]),
    }


def compiled(
    given: dict[str, Tensor], raw_config: dict[str, Any], out_features: int, in_features: int
) -> Any:
    base = Site(PATH, torch.zeros(out_features, in_features), None)
    check_adapter(raw_config, given, {PATH: base})
    method = method_for(raw_config)
    (part,) = method.compile(method.parse(raw_config), given, {PATH: base}).sites[PATH]
    return part


def expected_change(given: dict[str, Tensor], threshold: float) -> Tensor:
    """As the released code computes it, [in, out], and turned at the end."""
    q, p = given[f"{STEM}.snell_in"].tolist(), given[f"{STEM}.snell_out"].tolist()
    rows = []
    for i in range(len(q[0])):
        row = [0.1 * (math.dist(q[0][i], p[0][o]) - math.dist(q[1][i], p[1][o])) for o in range(len(p[0]))]
        powers = [math.exp(entry / GAMMA) for entry in row]
        rows.append([k + ALPHA * e / sum(powers) + BETA for k, e in zip(row, powers, strict=True)])
    ordered = sorted(abs(entry) for row in rows for entry in row)
    at = threshold * (len(ordered) - 1)
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    edge = low + (high - low) * (at - math.floor(at))
    return torch.tensor([[k * abs(k) if abs(k) > edge else 0.0 for k in row] for row in rows]).T


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.5, 0.8, 28 / 29])
def test_what_survives_the_layer_s_threshold_is_the_change(threshold: float, evaluate: Any) -> None:
    given = tensors(5, 6)
    part = compiled(given, raw(threshold), 5, 6)
    assert isinstance(part, Sparse if threshold > 0.9 else Dense)
    expected = expected_change(given, threshold)
    torch.testing.assert_close(evaluate.change(part, torch.eye(6), torch.zeros(6, 5)).T, expected)
    assert int((expected == 0).sum()) == math.floor(threshold * 29) + 1


def test_a_layer_without_a_threshold_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=f"thresholds: found none of '{PATH}'"):
        compiled(tensors(4, 6), {**raw(0.0), "thresholds": {"elsewhere": 0.5}}, 4, 6)
    for wrong in (1.0, -0.1, "0.5", float("nan")):
        with pytest.raises(InvalidConfig, match="thresholds"):
            compiled(tensors(4, 6), {**raw(0.0), "thresholds": {PATH: wrong}}, 4, 6)


def test_a_kernel_that_divides_by_zero_or_is_not_whole_is_refused() -> None:
    given = tensors(4, 6)
    with pytest.raises(InvalidTensors, match="snella_gamma: found 0"):
        compiled({**given, f"{STEM}.snella_gamma": torch.zeros(1)}, raw(0.0), 4, 6)
    del given[f"{STEM}.snella_beta"]
    with pytest.raises(InvalidTensors, match="snella_beta is missing"):
        compiled(given, raw(0.0), 4, 6)
