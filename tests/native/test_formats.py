"""Numbers go to 16 bits where all of them come back, or where they shall be rounded, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from timbre_server.native.formats import narrowed

BRAIN = [1.0, -0.0, 1 + 2**-7, 3e38, -(2.0**-133)]
"""float16 holds neither of the last two."""
HALF = [1.0, -0.0, 1 + 2**-10, 65504.0, 3 * 2.0**-24]
"""bfloat16 does not hold the third."""


@pytest.mark.parametrize(("values", "dtype"), [(BRAIN, torch.bfloat16), (HALF, torch.float16)])
def test_values_that_come_back_are_held_in_half(values: list[float], dtype: torch.dtype) -> None:
    before = torch.tensor(values).to(dtype).float()
    found = narrowed(before)
    assert found.dtype == dtype
    assert torch.equal(found.float().view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("odd", [1 + 2**-11, 1 + 2**-10 + 2**-20, 2.0**-26, 1e5, float("nan")])
def test_one_value_that_does_not_come_back_keeps_all(odd: float) -> None:
    before = torch.tensor([*HALF, odd])
    assert narrowed(before) is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_shall_be_rounded_is_to_the_nearest(dtype: torch.dtype) -> None:
    before = torch.tensor([1 + 2**-11 + 2**-20, -(0.1**3), 0.0])
    found = narrowed(before, dtype)
    assert found.dtype == dtype
    assert torch.equal(found.float(), before.to(dtype).float())


def test_values_that_come_back_are_not_rounded() -> None:
    before = torch.tensor(HALF)
    assert torch.equal(narrowed(before, torch.bfloat16).float(), before)


def test_values_too_large_for_a_type_are_not_rounded_to_it() -> None:
    before = torch.tensor([1 + 2**-20, 1e5])
    assert narrowed(before, torch.float16) is before
    assert narrowed(before, torch.bfloat16).dtype == torch.bfloat16
