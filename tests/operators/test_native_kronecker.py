"""Kronecker products in C++ against PyTorch: matrices of any shapes, which meet rows in any order."""

from __future__ import annotations

import pytest
import torch
from crowds import CROWDS as CROWDS_OF_TWELVE
from torch import Tensor

from timbre_methods.program import Kronecker
from timbre_server.operators.contract import Operator
from timbre_server.operators.kronecker import KroneckerOperator
from timbre_server.operators.native.kronecker import NativeKronecker
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

CROWDS = CROWDS_OF_TWELVE | {"one by one": [Span(1, ((row % 3, 1.0),)) for row in range(20)]}
SHAPES = [
    ((1, 1), (40, 50)),
    ((50, 40), (1, 1)),
    ((1, 7), (9, 3)),
    ((2, 9), (3, 11)),
    ((9, 2), (40, 10)),
    ((24, 24), (24, 32)),
    ((3, 4), (70, 600)),
]


def drawn(
    w1: tuple[int, int], w2: tuple[int, int], rank: int | None, generator: torch.Generator
) -> Kronecker:
    """Of columns that lie one after another; scaled so that changes are about 1."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(columns, rows, generator=generator).T / columns**0.5

    if rank is None:
        return Kronecker(normal(*w1), normal(*w2))
    return Kronecker(normal(*w1), normal(w2[0], rank), normal(rank, w2[1]))


def added(
    operator: Operator[Kronecker], parts: dict[int, list[Kronecker]], spans: list[Span], x_TI: Tensor
) -> Tensor:
    """To ones, of -0.0 in the first column."""
    first = parts[0][0]
    y_TO = torch.ones(len(x_TI), len(first.w1_LM) * len(first.w2_KR))
    y_TO[:, 0] = -0.0
    for change in operator.bind([parts], RowTable(spans)).sums(x_TI)[0]:
        change.add_to(y_TO)
    return y_TO


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("rank", [None, 1, 8, 13])
@pytest.mark.parametrize(("w1", "w2"), SHAPES)
def test_products_of_any_shapes_are_added_and_base_rows_keep_their_bits(
    w1: tuple[int, int], w2: tuple[int, int], rank: int | None, crowd: str
) -> None:
    """One adapter has two parts, the other one of another shape of matrices."""
    generator, spans = torch.Generator().manual_seed(sum(w1 + w2)), CROWDS[crowd]
    parts = {slot: [drawn(w1, w2, rank, generator)] for slot in range(12)}
    parts[0].append(drawn(w2, w1, rank, generator))
    x_TI = torch.randn(RowTable(spans).num_rows, w1[1] * w2[1], generator=generator)
    native, plain = (added(each, parts, spans, x_TI) for each in (NativeKronecker(), KroneckerOperator()))
    torch.testing.assert_close(native, plain, atol=2e-5, rtol=2e-5)
    row = 0
    for span in spans:
        if not span.pairs:
            assert native[row, 0].signbit()
            assert torch.equal(native[row, 1:], torch.ones(native.shape[1] - 1))
        row += span.num_rows


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [None, 5])
@pytest.mark.parametrize(("w1", "w2"), SHAPES)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(
    w1: tuple[int, int], w2: tuple[int, int], rank: int | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = {slot: [drawn(w1, w2, rank, generator)] for slot in range(2)}
    x_TI = torch.randn(45, w1[1] * w2[1], generator=generator)
    one, other = ((0, 0.7),), ((1, 0.3), (0, 0.7))
    crowds = [[Span(45, one)], [Span(30, one), Span(15, other)], [Span(7, other), Span(38, one)]]
    whole, *mixed = (added(NativeKronecker(), parts, spans, x_TI) for spans in crowds)
    alone = [added(NativeKronecker(), parts, [Span(1, one)], x_TI[row : row + 1]) for row in range(45)]
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(mixed[0][:30], whole[:30])
    assert torch.equal(mixed[1][7:], whole[7:])


def test_the_shapes_here_have_all_orders_of_products() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [drawn(w1, w2, rank, generator) for w1, w2 in SHAPES for rank in (None, 1, 8, 13)]
    count_and_before = {NativeKronecker().prepared_part(part).fields[-2:] for part in parts}
    assert count_and_before == {(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}
