"""Matrices with patterns of their own along one diagonal."""

from __future__ import annotations

import pytest
import torch

from timbre_server.operators.block_diagonal import BlockDiagonal, Csr


def matrix(count: int, generator: torch.Generator) -> tuple[Csr, torch.Tensor]:
    """A random 5 x 7 matrix with so many non-zeros, as CSR and dense."""
    cells = torch.randperm(35, generator=generator)[:count].sort().values
    values = torch.randn(count, generator=generator)
    row_ends = torch.searchsorted(cells, torch.arange(6) * 7)
    dense_OI = torch.zeros(35).index_put((cells,), values).view(5, 7)
    return Csr(row_ends, (cells % 7).int(), values), dense_OI


@pytest.mark.parametrize("counts", [(4, 4, 4), (1, 9, 3), (6,), (0, 5), (0, 0)], ids=str)
def test_each_pair_meets_its_own_matrix(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(sum(counts))
    matrices = [matrix(count, generator) for count in counts]
    before = [block.columns_Z.clone() for block, _ in matrices]
    x_PI = torch.randn(len(counts), 7, generator=generator)
    found_PO = BlockDiagonal.stacked([block for block, _ in matrices], (5, 7))(x_PI)
    expected_PO = torch.stack([dense_OI @ x for (_, dense_OI), x in zip(matrices, x_PI, strict=True)])
    torch.testing.assert_close(found_PO, expected_PO)
    assert all(
        torch.equal(block.columns_Z, columns) for (block, _), columns in zip(matrices, before, strict=True)
    )
