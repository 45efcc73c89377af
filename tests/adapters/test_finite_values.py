"""What a load looks for: values that overflowed where they were multiplied."""

from __future__ import annotations

import math

import pytest
import torch

from timbre_server.adapters.loader import _is_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 3e38, math.inf, -math.inf, math.nan])
def test_values_that_overflow_are_found(value: float, dtype: torch.dtype) -> None:
    """Also beside others of their sign: their sum is too large, and they are not."""
    numbers = torch.tensor([0.5, value, value, -2.0], dtype=dtype)
    assert _is_finite(numbers) == math.isfinite(value)


def test_infinities_of_both_signs_are_found() -> None:
    assert not _is_finite(torch.tensor([math.inf, 1.0, -math.inf]))


def test_whole_numbers_and_factors_without_ranks_are_finite() -> None:
    assert _is_finite(torch.tensor([1, 2]))
    assert _is_finite(torch.empty(0, 8))
