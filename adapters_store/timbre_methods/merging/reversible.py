"""A pool of vectors that stands for a collection of LoRAs of one rank, from which each is rebuilt.

Reversible Model Merging, arXiv 2510.14163: at each place r of the rank, the rows ``A_k[r]`` of all adapters
are points, and their mean and first P principal components stand for them; so do the columns ``B_k[:, r]``.
Adapter k keeps 2 R P coefficients. Nothing has to be rebuilt to serve one: with the pools as rows of A and
columns of B it is a core between them,

    ΔW_k ≈ N E_k D_k M     M [R (1 + P), I], N [O, R (1 + P)], D_k and E_kᵀ [R, R (1 + P)] with
                           1 and the coefficients of place r in row r, at the vectors of place r

From ``P = K - 1`` on it is exact. The rows are taken as they are, however large an adapter's change.

Legend: I in features, O out features, K adapters, R their rank, P components, W = R (1 + P), D = I or O.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_methods.merging.joint_basis import JointBasis
from timbre_methods.merging.truncation import square_norm_of_product


def reversible_basis(pairs: Sequence[tuple[Tensor, Tensor]], components: int) -> JointBasis:
    """From the factors ``A_k`` [R, I] and ``B_k`` [O, R] of each, all of one rank. Deterministic."""
    m_WI, d_KRW = _pool(torch.stack([a.double() for a, _ in pairs]), components)
    n_WO, e_KRW = _pool(torch.stack([b.double().T for _, b in pairs]), components)
    left_out_K = tuple(
        square_norm_of_product(
            torch.cat([a.double(), d_RW @ m_WI]), torch.cat([b.double(), -(e_RW @ n_WO).T], dim=1)
        )
        for (a, b), d_RW, e_RW in zip(pairs, d_KRW, e_KRW, strict=True)
    )
    return JointBasis(
        m_WI.float(),
        n_WO.T.float(),
        (e_KRW.mT @ d_KRW).float(),
        tuple(square_norm_of_product(a, b) for a, b in pairs),
        left_out_K,
    )


def _pool(rows_KRD: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """The vectors [W, D], and each adapter's [R, W] that rebuilds its rows of them."""
    num_adapters, rank, _ = rows_KRD.shape
    rows_RKD = rows_KRD.transpose(0, 1)
    mean_R1D = rows_RKD.mean(1, keepdim=True)
    u_RKP, s_RP, v_RPD = torch.linalg.svd(rows_RKD - mean_R1D, full_matrices=False)
    kept = min(components, s_RP.shape[1])
    missing = components - kept
    coefficients_RKP = pad((u_RKP * s_RP.unsqueeze(1))[..., :kept], (0, missing))
    vectors_RVD = torch.cat([mean_R1D, pad(v_RPD[:, :kept], (0, 0, 0, missing))], dim=1)
    own_KRV = torch.cat([torch.ones(num_adapters, rank, 1).double(), coefficients_RKP.transpose(0, 1)], dim=2)
    placed_KRRV = torch.einsum("krv,rs->krsv", own_KRV, torch.eye(rank).double())
    return vectors_RVD.flatten(0, 1), placed_KRRV.flatten(2)
