"""A collection of changes in one basis, each with a small core: ``ΔW_k ≈ B S_k A``.

Joint diagonalisation of arXiv 2407.00066. B and A belong to all, S_k is the adapter's own:

* ``full``: S_k any matrix [R, R], the columns of B and the rows of A orthonormal (a Tucker-2 decomposition,
  by alternating eigenvectors). For a given basis ``S_k = Bᵀ ΔW_k Aᵀ`` is best.
* ``diagonal``: S_k diagonal, B and A free (a canonical decomposition, by alternating least squares from the
  basis of ``full``).

Each change counts with the same weight, however large: they are divided by their Frobenius norms before, and
multiplied again after. All work is done in the span of the factors, at most Σ R_k wide, in float64.

Legend: I in features, O out features, C the width of a factor, K adapters, M and N the widths of the spans on
the output and the input side, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_methods.merging.truncation import square_norm_of_product

FULL_STEPS, DIAGONAL_STEPS = 50, 200
CONVERGED = 1e-10
"""The least relative gain of a step that is worth another."""

Form = Literal["full", "diagonal"]


@dataclass(frozen=True, slots=True, eq=False)
class JointBasis:
    """``a_RI`` [R, I], ``b_OR`` [O, R] and the cores ``s_KRR``, float32; squared norms of each change, and of
    what its core leaves out."""

    a_RI: Tensor
    b_OR: Tensor
    s_KRR: Tensor
    whole_K: tuple[float, ...]
    left_out_K: tuple[float, ...]


def joint_basis(
    pairs: Sequence[tuple[Tensor, Tensor]], rank: int, form: Form, proceed: Callable[[], None] = lambda: None
) -> JointBasis:
    """From the factors ``A_k`` [C, I] and ``B_k`` [O, C] of each. Deterministic; ``proceed`` may end it."""
    whole_K = tuple(square_norm_of_product(a, b) for a, b in pairs)
    norms_K = torch.tensor(whole_K, dtype=torch.float64).sqrt()
    inner_IN = torch.linalg.qr(torch.cat([a.double() for a, _ in pairs]).T).Q
    outer_OM = torch.linalg.qr(torch.cat([b.double() for _, b in pairs], dim=1)).Q
    x_KMN = torch.stack([(outer_OM.T @ b.double()) @ (a.double() @ inner_IN) for a, b in pairs])
    x_KMN = x_KMN / norms_K.clamp(min=1e-300)[:, None, None]
    u_MR, v_NR = _full(x_KMN, rank, proceed)
    s_KRR = u_MR.T @ x_KMN @ v_NR
    if form == "diagonal":
        u_MR, v_NR, s_KR = _diagonal(x_KMN, u_MR, v_NR, proceed)
        s_KRR = torch.diag_embed(s_KR)
    rest_KMN = x_KMN - u_MR @ s_KRR @ v_NR.T
    left_out_K = rest_KMN.square().sum((1, 2)) * norms_K.square()
    missing = rank - u_MR.shape[1]
    s_KRR = pad(s_KRR * norms_K[:, None, None], (0, missing, 0, missing))
    return JointBasis(
        pad(inner_IN @ v_NR, (0, missing)).T.float(),
        pad(outer_OM @ u_MR, (0, missing)).float(),
        s_KRR.float(),
        whole_K,
        tuple(left_out_K.tolist()),
    )


def _full(x_KMN: Tensor, rank: int, proceed: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Orthonormal U [M, R] and V [N, R] that keep the most of ``Σ ‖Uᵀ X_k V‖²``."""
    v_NR = _leading(torch.einsum("kmn,kmp->np", x_KMN, x_KMN), rank)
    kept = 0.0
    for _ in range(FULL_STEPS):
        proceed()
        y_KMR = x_KMN @ v_NR
        u_MR = _leading(torch.einsum("kmr,kpr->mp", y_KMR, y_KMR), rank)
        y_KRN = u_MR.T @ x_KMN
        v_NR = _leading(torch.einsum("krn,krp->np", y_KRN, y_KRN), rank)
        before, kept = kept, float((y_KRN @ v_NR).square().sum())
        if kept - before <= CONVERGED * kept:
            break
    return u_MR, v_NR


def _leading(gram: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :rank]


def _diagonal(
    x_KMN: Tensor, u_MR: Tensor, v_NR: Tensor, proceed: Callable[[], None]
) -> tuple[Tensor, Tensor, Tensor]:
    """U [M, R], V [N, R] and S [K, R] of ``X_k ≈ U diag(S_k) Vᵀ``; U and V have columns of length 1."""
    left_out = float("inf")
    rank = min(u_MR.shape[1], v_NR.shape[1])
    u_MR, v_NR = u_MR[:, :rank], v_NR[:, :rank]
    for _ in range(DIAGONAL_STEPS):
        proceed()
        s_KR = _solved(((x_KMN @ v_NR) * u_MR).sum(1), u_MR, v_NR)
        u_MR = _unit(_solved(((x_KMN @ v_NR) * s_KR[:, None]).sum(0), s_KR, v_NR))
        v_NR = _unit(_solved(((x_KMN.mT @ u_MR) * s_KR[:, None]).sum(0), s_KR, u_MR))
        s_KR = _solved(((x_KMN @ v_NR) * u_MR).sum(1), u_MR, v_NR)
        rest = float((x_KMN - (u_MR * s_KR[:, None]) @ v_NR.T).square().sum())
        if rest > (1 - CONVERGED) * left_out:
            break
        left_out = rest
    return u_MR, v_NR, s_KR


def _solved(target_XR: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The least squares solution of the factor that is looked for, where the two others are given."""
    inverse_RR: Tensor = torch.linalg.pinv((one.T @ one) * (other.T @ other), hermitian=True)
    return target_XR @ inverse_RR


def _unit(factor_XR: Tensor) -> Tensor:
    lengths_R: Tensor = torch.linalg.vector_norm(factor_XR, dim=0)
    return factor_XR / lengths_R.clamp(min=1e-300)
