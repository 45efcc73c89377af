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
        warnings.filterwarnings("ignore", "Sparse invariant checks are implicitly disabled", UserWarning)
        return torch.sparse_csr_tensor(
            row_ends.int(), columns_Z.int(), values_Z, shape, check_invariants=False
        )


def pooled_bytes(non_zeros: int, shape: tuple[int, int]) -> int:
    """What one pair takes in a `BlockDiagonal`: its matrix, its input and its output."""
    return 8 * non_zeros + 4 * (2 * shape[0] + shape[1])


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
        counts = [len(block.columns_Z) for block in blocks]
        device = blocks[0].row_ends.device
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)
        ends_PO = torch.stack([block.row_ends for block in blocks])[:, :-1].to(torch.int32, copy=True)
        ends_PO += starts[:-1].unsqueeze(1)
        return BlockDiagonal(
            torch.cat([ends_PO.flatten(), starts[-1:]]),
            _side_by_side([block.columns_Z for block in blocks], counts, shape[1]),
            torch.cat([block.values_Z for block in blocks]),
            pairs=len(blocks),
            shape=shape,
        )

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


def _side_by_side(columns: Sequence[Tensor], counts: Sequence[int], in_features: int) -> Tensor:
    """The columns of matrices that stand beside each other, int32; nothing runs once a matrix."""
    shifts_P = torch.arange(len(columns), dtype=torch.int32, device=columns[0].device) * in_features
    if len(set(counts)) == 1:
        return torch.stack(list(columns)).add_(shifts_P.unsqueeze(1)).flatten()
    repeats_P = torch.tensor(counts, device=shifts_P.device)
    shifts = torch.repeat_interleave(shifts_P, repeats_P, output_size=sum(counts))
    return torch.cat(list(columns)).add_(shifts)
