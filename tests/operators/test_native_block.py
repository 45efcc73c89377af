"""Dense matrices on some channels or all, in C++ against PyTorch."""

from __future__ import annotations

import pytest
import torch
from crowds import CROWDS
from torch import Tensor

from timbre_methods.program import Block, Dense, Part
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.contract import Operator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.native.block import NativeBlock, NativeDense
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

PAIRS: dict[str, tuple[Operator[Block], Operator[Block]] | tuple[Operator[Dense], Operator[Dense]]] = {
    "input": (NativeBlock(), BlockOperator()),
    "output": (NativeBlock(), BlockOperator()),
    "dense": (NativeDense(), DenseOperator()),
}
SIZES = [(1, 1, 1), (7, 50, 3), (24, 16, 16), (21, 1000, 13), (70, 40_000, 9)]
"""O, I, and channels, if there are so many."""


def drawn(kind: str, sizes: tuple[int, int, int], generator: torch.Generator) -> Part:
    """Of columns that lie one after another; scaled so that changes are about 1."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(columns, rows, generator=generator).T / columns**0.5

    out_features, in_features, count = sizes
    if kind == "dense":
        return Dense(normal(out_features, in_features))
    features = in_features if kind == "input" else out_features
    index = torch.randperm(features, generator=generator)[:count]
    if kind == "input":
        return Block("input", index, normal(out_features, len(index)), out_features)
    return Block("output", index, normal(len(index), in_features), out_features)


def added(
    operator: Operator, parts: dict[int, list[Part]], spans: list[Span], x_TI: Tensor, out: int
) -> Tensor:  # type: ignore[type-arg]
    """To ones, of -0.0 in the first column."""
    y_TO = torch.ones(len(x_TI), out)
    y_TO[:, 0] = -0.0
    for change in operator.bind([parts], RowTable(spans)).sums(x_TI)[0]:
        change.add_to(y_TO)
    return y_TO


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matrices_are_added_and_base_rows_keep_their_bits(
    sizes: tuple[int, int, int], kind: str, crowd: str
) -> None:
    """One adapter has two parts."""
    generator, spans = torch.Generator().manual_seed(sum(sizes)), CROWDS[crowd]
    parts = {slot: [drawn(kind, sizes, generator)] for slot in range(12)}
    parts[0].append(drawn(kind, sizes, generator))
    x_TI = torch.randn(RowTable(spans).num_rows, sizes[1], generator=generator)
    native, plain = (added(each, parts, spans, x_TI, sizes[0]) for each in PAIRS[kind])
    # Of 40,000 columns PyTorch's own sums are off by 4e-5 with two threads, those in C++ by 1e-5.
    torch.testing.assert_close(native, plain, atol=5e-5 if sizes[1] > 1000 else 2e-5, rtol=2e-5)
    row = 0
    for span in spans:
        if not span.pairs:
            assert native[row, 0].signbit()
            assert torch.equal(native[row, 1:], torch.ones(sizes[0] - 1))
        row += span.num_rows


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(sizes: tuple[int, int, int], kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = {slot: [drawn(kind, sizes, generator)] for slot in range(2)}
    x_TI = torch.randn(15, sizes[1], generator=generator)
    one, other = ((0, 0.7),), ((1, 0.3), (0, 0.7))
    operator = PAIRS[kind][0]
    whole = added(operator, parts, [Span(15, one)], x_TI, sizes[0])
    mixed = added(operator, parts, [Span(7, other), Span(8, one)], x_TI, sizes[0])
    alone = [added(operator, parts, [Span(1, one)], x_TI[row : row + 1], sizes[0]) for row in range(15)]
    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(mixed[7:], whole[7:])


def test_a_block_of_no_channels_does_nothing() -> None:
    part = Block("output", torch.zeros(0, dtype=torch.int64), torch.zeros(0, 5), 4)
    prepared = NativeBlock().prepared([[part], [drawn("output", (4, 5, 2), torch.Generator())]])
    assert set(prepared.members) == {1}
