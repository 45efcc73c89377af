"""Numbers go to 16 bits where all of them come back, or where they shall be rounded, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from timbre_server.native.formats import narrowed, narrowed_rows
from timbre_server.native.library import library

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


def test_an_infinity_among_others_is_no_float16() -> None:
    """Kernels read float16 as finite numbers."""
    before = torch.tensor([*HALF, torch.inf])
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


@pytest.mark.cpp
@pytest.mark.parametrize("rounded_to", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 21), (8, 40), (13, 64), (16, 27), (17, 8)], ids=str)
def test_cpp_copies_what_is_narrowed_bit_for_bit(
    shape: tuple[int, int], rounded_to: torch.dtype | None
) -> None:
    """Of rows that lie one after another, of columns that do, and of numbers that lie apart."""
    library()
    generator = torch.Generator().manual_seed(1)
    rows, columns = shape
    each_way = (
        torch.randn(rows, columns, generator=generator),
        torch.randn(columns, rows, generator=generator).T,
        torch.randn(2 * rows, 3 * columns, generator=generator)[::2, ::3],
    )
    odd = (1e-40, 3e38, 1 + 2**-8, 1 + 2**-10, 70_000.0, math.inf, math.nan, -3.4e38)
    for before in each_way:
        variants = [before, before.bfloat16().float(), before.half().float()]
        if before.numel():
            variants += [with_last(each, value) for each in variants for value in odd]
        for values in variants:
            for blocks in ([values], [before[:1], values, values]):
                found, expected = narrowed_rows(blocks, rounded_to), narrowed(torch.cat(blocks), rounded_to)
                assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
                assert found.is_contiguous()
                assert found.untyped_storage().nbytes() == found.nbytes
                assert torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))


def with_last(values: Tensor, last: float) -> Tensor:
    """A copy that lies as the values do."""
    found = values.clone()
    found[-1, -1] = last
    return found


@pytest.mark.cpp
def test_rows_of_other_lengths_do_not_lie_together() -> None:
    library()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        narrowed_rows([torch.ones(2, 8), torch.ones(2, 4)])
