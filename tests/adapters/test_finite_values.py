"""What a load looks for: values that overflowed where they were multiplied."""

from __future__ import annotations

import math

import pytest
import torch

from timbre_server.adapters.loader import _are_finite


@pytest.mark.parametrize("value", [1.0, 3e38, math.inf, -math.inf, math.nan])
def test_values_that_overflow_are_found(value: float) -> None:
    assert _are_finite([torch.empty(0, 8), torch.tensor([0.5, value, -2.0])]) == math.isfinite(value)


def test_factors_without_ranks_are_finite() -> None:
    assert _are_finite([torch.empty(0, 8)])
