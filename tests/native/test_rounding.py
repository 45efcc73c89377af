"""Numbers are rounded to bfloat16 alike wherever they lie, and as PyTorch rounds them."""

from __future__ import annotations

import pytest
import torch

from timbre_server.native.rounding import round_into, rounded

NUMBERS = [
    0.0,
    -0.0,
    1.0,
    1.00390625,
    1.01171875,
    -3.1415927,
    3.4e38,
    -3.4e38,
    torch.inf,
    -torch.inf,
    1.2e-38,
]
NUMBERS += [1e-38, -1e-38, 9.2e-41, -1e-45]
"""The last ones lie below the normal numbers; some processors would make zeros of them."""


@pytest.mark.cpp
@pytest.mark.usefixtures("threads")
def test_a_number_rounds_alike_wherever_it_lies() -> None:
    for number in NUMBERS:
        sums = torch.full((3, 23), number)
        among_others = round_into(torch.empty_like(sums, dtype=torch.bfloat16), sums).view(torch.int16)
        alone = round_into(torch.empty(1, dtype=torch.bfloat16), sums[0, :1]).view(torch.int16)
        assert among_others.unique().tolist() == alone.tolist(), number


@pytest.mark.cpp
def test_numbers_round_as_in_pytorch() -> None:
    torch.manual_seed(1)
    sums = torch.cat([torch.tensor(NUMBERS), torch.randn(1000), torch.randn(100) * 1e30])
    found = round_into(torch.empty_like(sums, dtype=torch.bfloat16), sums)
    assert torch.equal(found.view(torch.int16), sums.bfloat16().view(torch.int16))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(rounded(sums, dtype), sums.to(dtype))
    assert round_into(torch.empty(40, dtype=torch.bfloat16), torch.full((40,), torch.nan)).isnan().all()
