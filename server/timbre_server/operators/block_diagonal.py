"""One sparse product for many rows that each have a sparse matrix of their own.

The matrices of all (row, adapter) pairs are laid along the diagonal of one CSR matrix, so that a single
call to the platform's sparse library does them all, instead of one call a pair.

Legend: P pairs, N rows, I in, O out, Z non-zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Csr(NamedTuple):
    """A sparse matrix: ``row_ends`` [O + 1], ``columns_Z`` and ``values_Z``."""

    row_ends: Tensor
    columns_Z: Tensor
    values_Z: Tensor


def csr(row_ends: Tensor, columns_Z: Tensor, values_Z: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR tensor with 32-bit indices. The caller vouches for the indices: they are not checked again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            row_ends.int(), columns_Z.int(), values_Z, shape, check_invariants=False
        )


class BlockDiagonal:
    """Sparse matrices [O, I] of P pairs, applied to P inputs at once."""

    def __init__(
        self, row_ends: Tensor, columns: Tensor, values: Tensor, *, pairs: int, shape: tuple[int, int]
    ) -> None:
        """The whole matrix [P · O, P · I], laid out as `stacked` and `repeated` do."""
        self._out, self._in = shape
        self._matrix = csr(row_ends, columns, values, (pairs * self._out, pairs * self._in))

    @staticmethod
    def stacked(blocks: Sequence[Csr], shape: tuple[int, int]) -> BlockDiagonal:
        """Of one matrix for each pair, with patterns of their own."""
        starts = list(accumulate((len(block.columns_Z) for block in blocks), initial=0))
        last = blocks[0].row_ends.new_tensor(starts[-1:])
        row_ends = torch.cat(
            [b.row_ends[:-1] + start for b, start in zip(blocks, starts, strict=False)] + [last]
        )
        columns = torch.cat([block.columns_Z + pair * shape[1] for pair, block in enumerate(blocks)])
        values = torch.cat([block.values_Z for block in blocks])
        return BlockDiagonal(row_ends, columns, values, pairs=len(blocks), shape=shape)

    @staticmethod
    def repeated(
        row_ends: Tensor, columns_Z: Tensor, pairs: int, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The row ends and columns of one pattern, once for each pair."""
        step = torch.arange(pairs, dtype=torch.int32, device=columns_Z.device).unsqueeze(1)
        ends = (row_ends[:-1] + step * len(columns_Z)).flatten()
        last = row_ends.new_tensor([pairs * len(columns_Z)])
        return torch.cat([ends, last]), (columns_Z + step * shape[1]).flatten()

    def __call__(self, x_PI: Tensor) -> Tensor:
        """[P, O]: each pair's matrix times its own row."""
        return (self._matrix @ x_PI.reshape(-1)).view(-1, self._out)
