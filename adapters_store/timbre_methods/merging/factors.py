"""Merges of LoRA's factors themselves, which depend on how an adapter's ΔW is divided into A and B.

All scales are in B. Weights are w_k, and R_k is the rank of adapter k at the site.

``lorahub`` (arXiv 2307.13269)::

    A = Σ w_k A_k     B = Σ w_k B_k     all of one rank

so that ``B A = ΣΣ w_j w_k B_j A_k``: squared weights and cross terms, as its authors' code has it.

``lego`` (arXiv 2409.16167): each of the Σ R_k units, a row of A with its column of ``w_k B``, is one vector.
K-means, begun by k-means++, makes ``rank`` clusters of them. A cluster becomes one unit again: its centroid,
scaled to the mean length of its members, since averaging shortens. In the end B is scaled by
``sqrt(mean R_k / rank)``, so that the output's variance does not grow with the rank.

Legend: I in features, O out features, R rank, P pooled units, D = I + O.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

LLOYD_STEPS = 100

Pair = tuple[Tensor, Tensor]
"""``A`` [R, I] and ``B`` [O, R]."""


def lorahub(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """Pairs of one rank."""
    a_RI, b_OR = torch.zeros_like(pairs[0][0]), torch.zeros_like(pairs[0][1])
    for (a, b), weight in zip(pairs, weights, strict=True):
        a_RI += weight * a
        b_OR += weight * b
    return a_RI, b_OR


def lego(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    rank: int,
    generator: torch.Generator,
    proceed: Callable[[], None] = lambda: None,
) -> Pair:
    """A pair of this rank, which is at most that of all pairs together; ``proceed`` may end it."""
    units_PD = torch.cat(
        [torch.cat([a, weight * b.T], dim=1) for (a, b), weight in zip(pairs, weights, strict=True)]
    ).double()
    cluster_P = _clustered(units_PD, rank, generator, proceed)
    centroids_RD = _means(units_PD, cluster_P, rank)
    lengths_R = _means(units_PD.norm(dim=1, keepdim=True), cluster_P, rank).squeeze(1)
    centroids_RD *= (lengths_R / centroids_RD.norm(dim=1).clamp(min=1e-30)).unsqueeze(1)
    features = pairs[0][0].shape[1]
    mean_rank = len(units_PD) / len(pairs)
    b_RO = centroids_RD[:, features:] * math.sqrt(mean_rank / rank)
    return centroids_RD[:, :features].float(), b_RO.T.float()


def _means(values_PD: Tensor, cluster_P: Tensor, k: int) -> Tensor:
    """Of each of k clusters."""
    sums_KD = values_PD.new_zeros(k, values_PD.shape[1]).index_add_(0, cluster_P, values_PD)
    return sums_KD / torch.bincount(cluster_P, minlength=k).unsqueeze(1)


def _clustered(units_PD: Tensor, k: int, generator: torch.Generator, proceed: Callable[[], None]) -> Tensor:
    """The number of each unit's cluster, none of them empty."""
    centres_KD = units_PD[_spread_out(units_PD, k, generator)]
    cluster_P = torch.full((len(units_PD),), -1)
    for _ in range(LLOYD_STEPS):
        proceed()
        distances_PK = torch.cdist(units_PD, centres_KD)
        found_P = distances_PK.argmin(1)
        _fill_empty(found_P, distances_PK)
        if torch.equal(found_P, cluster_P):
            break
        cluster_P = found_P
        centres_KD = _means(units_PD, cluster_P, k)
    return cluster_P


def _spread_out(units_PD: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """The first centres: k units, each drawn by its squared distance to those before (k-means++)."""
    chosen = [int(torch.randint(len(units_PD), (1,), generator=generator))]
    nearest_P = units_PD.new_full((len(units_PD),), math.inf)
    for _ in range(k - 1):
        nearest_P = torch.minimum(nearest_P, (units_PD - units_PD[chosen[-1]]).square().sum(1))
        squares_P = nearest_P.clone()
        squares_P[chosen] = 0
        if not squares_P.sum() > 0:  # Units that are left are copies of chosen ones.
            squares_P = torch.ones_like(squares_P)
            squares_P[chosen] = 0
        chosen.append(int(torch.multinomial(squares_P, 1, generator=generator)))
    return torch.tensor(chosen)


def _fill_empty(cluster_P: Tensor, distances_PK: Tensor) -> None:
    """Gives each empty cluster the unit that is farthest from its own, from a cluster that has others."""
    counts = torch.bincount(cluster_P, minlength=distances_PK.shape[1])
    for empty in (counts == 0).nonzero().flatten().tolist():
        far_P = distances_PK.gather(1, cluster_P.unsqueeze(1)).flatten()
        far_P[counts[cluster_P] < 2] = -1
        moved = int(far_P.argmax())
        counts[cluster_P[moved]] -= 1
        counts[empty] += 1
        cluster_P[moved] = empty
