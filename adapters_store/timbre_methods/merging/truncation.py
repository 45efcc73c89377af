"""The best matrix of a rank, as the two factors of a LoRA, and how far it is from the whole.

By Eckart and Young the leading singular triplets are best in the Frobenius norm. ``B = U Σ`` and ``A = Vᵀ``,
as PEFT's ``svd`` family writes them.

Legend: I in features, O out features, R rank, C a rank of factors, S oversampled columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_FEATURES = 1024
"""Up to so many features on the smaller side the decomposition is LAPACK's, in float64."""
OVERSAMPLED, ITERATIONS = 16, 6
"""Beyond it: a random range finder with power iterations, arXiv 0909.4061 algorithm 4.4."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """``b_OR a_RI`` float32, with the squared Frobenius norms of the whole and of what is left out."""

    a_RI: Tensor
    b_OR: Tensor
    whole: float
    left_out: float


def truncated_factors(a_CI: Tensor, b_OC: Tensor, rank: int) -> Truncated:
    """Of the product ``B A``, which is never built."""
    inner_IC, upper_CC = torch.linalg.qr(a_CI.double().T)
    outer_OC, right_CC = torch.linalg.qr(b_OC.double())
    u, s, v = torch.linalg.svd(right_CC @ upper_CC.T, full_matrices=False)
    squares = s.square()
    r = min(rank, len(s))
    b_OR = (outer_OC @ u[:, :r]) * s[:r]
    a_RI = v[:r] @ inner_IC.T
    return Truncated(a_RI.float(), b_OR.float(), float(squares.sum()), float(squares[r:].sum()))


def truncated(delta_OI: Tensor, rank: int) -> Truncated:
    """Of a whole matrix. Equal matrices give equal factors: what is random has a seed of its own."""
    smaller = min(delta_OI.shape)
    if smaller <= EXACT_FEATURES or rank + OVERSAMPLED >= smaller:
        exact = torch.float64 if smaller <= EXACT_FEATURES else torch.float32
        u, s, v = torch.linalg.svd(delta_OI.to(exact), full_matrices=False)
    else:
        basis_OS = _range(delta_OI, rank + OVERSAMPLED)
        u, s, v = torch.linalg.svd(basis_OS.T @ delta_OI, full_matrices=False)
        u = basis_OS @ u
    a_RI, b_OR = v[:rank].float(), (u[:, :rank] * s[:rank]).float()
    return Truncated(a_RI, b_OR, square_norm(delta_OI), square_norm(delta_OI - b_OR @ a_RI))


def square_norm(matrix: Tensor) -> float:
    """``‖M‖²``, added up in float64."""
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2


def _range(delta_OI: Tensor, columns: int) -> Tensor:
    """An orthonormal basis [O, S] of nearly all that the matrix puts out."""
    generator = torch.Generator().manual_seed(0)
    probe_IS = torch.randn(delta_OI.shape[1], columns, generator=generator)
    basis_OS: Tensor = torch.linalg.qr(delta_OI @ probe_IS).Q
    for _ in range(ITERATIONS):
        basis_IS = torch.linalg.qr(delta_OI.T @ basis_OS).Q
        basis_OS = torch.linalg.qr(delta_OI @ basis_IS).Q
    return basis_OS


def square_norm_of_product(a_CI: Tensor, b_OC: Tensor) -> float:
    """``‖B A‖²`` from the Gram matrices of the factors."""
    a_CI, b_OC = a_CI.double(), b_OC.double()
    return max(0.0, float(((b_OC.T @ b_OC) * (a_CI @ a_CI.T)).sum()))
