"""Factorisations of the base's weights, for `Method.derive`: the same calls that the trainers made.

LAPACK's results differ between machines in signs and in last bits, so whoever needs one of these computes
it once, at registration, and keeps it. All run in float32 and on the CPU, wherever the weight is; on the meta
device they give the shapes. This module knows no method and no file.

Legend: O out features, I in features, M rows, N columns, K min(O, I), R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """Singular triplets, largest first: ``W ≈ u_OR diag(sigma_R) v_RI``."""

    u_OR: Tensor
    sigma_R: Tensor
    v_RI: Tensor

    def first(self, rank: int) -> Triplets:
        return Triplets(self.u_OR[:, :rank], self.sigma_R[:rank], self.v_RI[:rank])

    def last(self, rank: int) -> Triplets:
        start = len(self.sigma_R) - rank
        return Triplets(self.u_OR[:, start:], self.sigma_R[start:], self.v_RI[start:])


def on_cpu(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight in another dtype and on the CPU; a meta tensor stays one."""
    return weight.to(weight.device if weight.is_meta else "cpu", dtype)


def thin_svd(weight_OI: Tensor) -> Triplets:
    """All K triplets of LAPACK's thin SVD."""
    return Triplets(*torch.linalg.svd(on_cpu(weight_OI), full_matrices=False))


def seeded_svd_lowrank(weight_OI: Tensor, rank: int, num_iterations: int, seed: int) -> Triplets:
    """The triplets of ``torch.svd_lowrank`` right after ``torch.manual_seed(seed)``, bit for bit.

    Randomised subspace iteration (arXiv 0909.4061, algorithms 4.4 and 5.1), with a generator of its own,
    because torch's function draws from the one that the whole process shares.
    """
    w_OI = on_cpu(weight_OI)
    out_features, in_features = w_OI.shape
    if w_OI.is_meta:
        u_OR, v_RI = w_OI.new_empty(out_features, rank), w_OI.new_empty(rank, in_features)
        return Triplets(u_OR, w_OI.new_empty(rank), v_RI)
    is_wide = out_features < in_features
    a_MN = w_OI.mH if is_wide else w_OI
    start_NR = torch.randn(a_MN.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    q_MR = torch.linalg.qr(a_MN @ start_NR).Q
    for _ in range(num_iterations):
        q_NR = torch.linalg.qr(a_MN.mH @ q_MR).Q
        q_MR = torch.linalg.qr(a_MN @ q_NR).Q
    u_RR, sigma_R, v_RN = torch.linalg.svd(q_MR.mH @ a_MN, full_matrices=False)
    left_MR = q_MR @ u_RR
    return Triplets(v_RN.mH, sigma_R, left_MR.mH) if is_wide else Triplets(left_MR, sigma_R, v_RN)


def ldu(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``P L`` [O, K], the pivots D [K] and ``U`` [K, I] with a unit diagonal: ``W = P L diag(D) U``.

    Partial pivoting, as in ``torch.linalg.lu``, without its P [O, O], which for a head is larger than memory.
    Rows of U after a pivot of zero are not finite.
    """
    w_OI = on_cpu(weight_OI)
    if w_OI.is_meta:
        size = min(w_OI.shape)
        return w_OI[:, :size], w_OI.new_empty(size), w_OI[:size]
    packed = torch.linalg.lu_factor_ex(w_OI)
    _, lower_OK, upper_KI = torch.lu_unpack(packed.LU, packed.pivots, unpack_pivots=False)
    rows = list(range(len(w_OI)))
    for row, other in enumerate((packed.pivots - 1).tolist()):
        rows[row], rows[other] = rows[other], rows[row]
    left_OK = torch.empty_like(lower_OK).index_copy(0, torch.tensor(rows), lower_OK)
    pivots_K = torch.diagonal(upper_KI)
    return left_OK, pivots_K, upper_KI / pivots_K.unsqueeze(1)
