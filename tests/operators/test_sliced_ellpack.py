"""Sparse matrices in slices: the same matrices as in CSR."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from timbre_methods.part_values import values_of
from timbre_methods.program import Sparse
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.native.library import library
from timbre_server.operators.sliced_ellpack import plain_slices_of, sliced, slices_of, unsliced
from timbre_server.operators.sparse import SparseOperator


def sparse(*columns_O: list[int], in_features: int = 9) -> Sparse:
    """Values 1, 2, 3 ... a third."""
    columns = [column for columns in columns_O for column in columns]
    row_ends = [0, *accumulate(len(columns) for columns in columns_O)]
    values = torch.arange(1.0, len(columns) + 1) / 3
    return Sparse(torch.tensor(row_ends), torch.tensor(columns, dtype=torch.int32), values, in_features)


def dense(part: Sparse) -> Tensor:
    identity, nothing = torch.eye(part.in_features), torch.zeros(part.in_features, len(part.row_ends) - 1)
    change_IO = SparseOperator().meaning(part, identity, nothing).change_TO
    assert change_IO is not None
    return change_IO.T


def test_outputs_with_most_entries_come_first_eight_of_them_side_by_side() -> None:
    part = slices_of(sparse([4], [], [7, 2], [1], [0], [0], [0], [0], [3], []))
    assert part.ranks_O.tolist() == [1, 8, 0, 2, 3, 4, 5, 6, 7, 9]
    assert part.lengths_S.tolist() == [2, 0]
    assert part.columns_KC.tolist() == [[7, 4, 1, 0, 0, 0, 0, 3], [2] * 8]
    assert (3 * part.values_KC).round().int().tolist() == [[2, 1, 4, 5, 6, 7, 8, 9], [3] + [0] * 7]


@pytest.mark.parametrize("shape", [(1, 1), (8, 30), (21, 9), (70, 300), (5, 40_000), (40_000, 5)])
def test_slices_are_read_back_as_the_same_matrix(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    size = shape[0] * shape[1]
    cells = torch.randint(size, (min(size, 3 * shape[0] + 40),), generator=generator).unique()
    row_ends = torch.searchsorted(cells, torch.arange(shape[0] + 1) * shape[1])
    values = torch.randn(len(cells), generator=generator)
    part = slices_of(Sparse(row_ends, (cells % shape[1]).int(), values, shape[1]))
    again = unsliced(part)
    outputs_N = torch.repeat_interleave(torch.arange(shape[0]), again.row_ends.diff())
    found = torch.stack([outputs_N * shape[1] + again.columns_N, torch.arange(len(outputs_N))])
    kept = again.values_N != 0
    order = found[0, kept].argsort()
    assert torch.equal(found[0, kept][order], cells)
    assert torch.equal(again.values_N[kept][order], values)


def random_sparse(most: int, outs: int, ins: int, generator: torch.Generator) -> Sparse:
    """With up to so many entries in a row, and with as many in all rows where there is no choice."""
    counts_O = torch.randint(max(0, most - 9), most + 1, (outs,), generator=generator)
    columns = [torch.randperm(ins, generator=generator)[:count] for count in counts_O.tolist()]
    row_ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts_O.cumsum(0)])
    values = torch.randn(int(row_ends[-1]), generator=generator)
    return Sparse(row_ends, torch.cat(columns).int(), values, ins)


@pytest.mark.cpp
@pytest.mark.parametrize("most", [0, 1, 7, 40])
@pytest.mark.parametrize("shape", [(1, 50), (8, 50), (21, 65_535), (300, 50)])
def test_cpp_makes_the_same_slices_bit_for_bit(shape: tuple[int, int], most: int) -> None:
    library()
    generator = torch.Generator().manual_seed(most)
    for own in (most, 0):
        part = random_sparse(own, *shape, generator)
        long = random_sparse(50, 1, shape[1], generator)
        ends = torch.cat([part.row_ends, part.row_ends[-1:] + long.row_ends[-1:]])
        columns, values = (
            torch.cat([each, other])
            for each, other in ((part.columns_N, long.columns_N), (part.values_N, long.values_N))
        )
        for each in (part, Sparse(ends, columns, values, shape[1])):
            found, expected = slices_of(each), plain_slices_of(each)
            for own_values, other_values in zip(values_of(found), values_of(expected), strict=True):
                if isinstance(other_values, Tensor):
                    assert own_values.dtype == other_values.dtype
                    assert torch.equal(own_values, other_values)
                else:
                    assert own_values == other_values


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("ends", "columns", "in_features"),
    [
        ([0, 3, 2], [0, 1], 9),
        ([0, 1, 3], [0, 1], 9),
        ([1, 1, 2], [0, 1], 9),
        ([0, -1, 2], [0, 1], 9),
        ([0, 1, 2], [0, 9], 9),
        ([0, 1, 2], [-1, 0], 9),
        ([0, 1, 2], [0, 1], 70_000),
    ],
)
def test_entries_that_lie_nowhere_are_refused(ends: list[int], columns: list[int], in_features: int) -> None:
    library()
    part = Sparse(torch.tensor(ends), torch.tensor(columns).int(), torch.ones(len(columns)), in_features)
    with pytest.raises(ValueError, match=r"entries do not lie|a column is not"):
        slices_of(part)


def test_a_matrix_without_entries_has_no_steps() -> None:
    part = slices_of(sparse(*[[]] * 20))
    assert part.columns_KC.shape == part.values_KC.shape == (0, 8)
    assert torch.equal(dense(unsliced(part)), torch.zeros(20, 9))


def test_values_lie_in_16_bits_where_these_say_what_float32_does() -> None:
    part = sparse(*[[0, 1]] * 8)
    halves = Sparse(part.row_ends, part.columns_N, torch.arange(16.0), 9)
    assert slices_of(part).values_KC.dtype == torch.float32
    assert slices_of(halves).values_KC.dtype == torch.bfloat16
    assert torch.equal(dense(unsliced(slices_of(halves))), dense(halves))


def test_what_would_take_more_memory_or_wider_numbers_stays_as_it_is() -> None:
    """One long output would be eight as long."""
    for part in (sparse(list(range(900)), *[[]] * 7, in_features=900), sparse([1], in_features=70_000)):
        assert sliced(part) is part
    even = sparse(*[list(range(900))] * 8, in_features=900)
    assert isinstance(sliced(even), SlicedEllpack)
