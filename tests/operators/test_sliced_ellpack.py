"""Sparse matrices in slices: the same matrices as in CSR."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from timbre_methods.program import Sparse
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.operators.sliced_ellpack import sliced, slices_of, unsliced
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
