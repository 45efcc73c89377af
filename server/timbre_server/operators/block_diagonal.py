"""One sparse product for many rows that each have a sparse matrix of their own.

The matrices of all (row, adapter) pairs are laid along the diagonal of one CSR matrix, so that a single
call to the platform's sparse library does them all, instead of one call a pair.

Legend: P pairs, N rows, I in, O out, Z non-zeros.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor


def csr(row_ends: Tensor, columns_Z: Tensor, values_Z: Tensor, shape: tuple[int, int]) -> Tensor:
    """A CSR tensor with 32-bit indices. The caller vouches for the indices: they are not checked again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            row_ends.int(), columns_Z.int(), values_Z, shape, check_invariants=False
        )


class BlockDiagonal:
    """Sparse matrices [O, I] of P pairs, applied to P inputs at once."""

    def __init__(self, blocks: Sequence[tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int]) -> None:
        """``blocks``: row_ends [O + 1], columns [Z], values [Z] for each pair."""
        self._out, self._in = shape
        starts = [0]
        for _, columns, _ in blocks:
            starts.append(starts[-1] + len(columns))
        row_ends = torch.cat(
            [ends[:-1] + start for (ends, _, _), start in zip(blocks, starts, strict=False)]
            + [blocks[0][0].new_tensor(starts[-1:])]
        )
        columns = torch.cat([columns + pair * self._in for pair, (_, columns, _) in enumerate(blocks)])
        values = torch.cat([values for _, _, values in blocks])
        count = len(blocks)
        self._matrix = csr(row_ends, columns, values, (count * self._out, count * self._in))

    def __call__(self, x_PI: Tensor) -> Tensor:
        """[P, O]: each pair's matrix times its own row."""
        return (self._matrix @ x_PI.reshape(-1)).view(-1, self._out)
