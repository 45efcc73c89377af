"""Merges of whole changes ``Δ_k = W_k - W`` with weights w_k, entry by entry, before any truncation.

``trim_d`` keeps the ``int(d n)`` entries of largest magnitude of the n. ``drop_d`` keeps each entry with
probability d and divides it by d, so that its expectation stays.

    magnitude_prune   Σ w_k trim_d(Δ_k)
    dare_linear       Σ w_k drop_d(Δ_k)                                       arXiv 2311.03099
    ties              agree(trim_d(Δ_1), …)                                   arXiv 2306.01708
    dare_ties         agree(drop_d(Δ_1), …)

``agree`` elects for each entry the sign of ``Σ t_k``, weights not looked at and 0 counted as plus, and takes
the mean of ``w_k t_k`` over those k whose t_k has that sign. These are PEFT's ``magnitude_prune_svd``,
``dare_linear_svd``, ``ties_svd`` and ``dare_ties_svd``. PEFT's kinds without ``_svd`` do the same to A and
to B, whose product then has cross terms between the adapters: they are another merge, not offered here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
RANDOM_KINDS = ("dare_linear", "dare_ties")


def merged(
    kind: str,
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """One of `KINDS`. The deltas have one shape, and are not kept."""
    if kind in RANDOM_KINDS:
        sparse = [dropped(delta, density, generator) for delta in deltas]
    else:
        sparse = [trimmed(delta, density) for delta in deltas]
    if kind in ("ties", "dare_ties"):
        return _agreeing_mean(sparse, weights)
    total = torch.zeros_like(sparse[0])
    for delta, weight in zip(sparse, weights, strict=True):
        total += weight * delta
    return total


def trimmed(delta: Tensor, density: float) -> Tensor:
    if density >= 1:
        return delta
    flat = delta.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).reshape(delta.shape)


def dropped(delta: Tensor, density: float, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return delta
    return delta * torch.bernoulli(torch.full_like(delta, density), generator=generator) / density


def _agreeing_mean(sparse: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(sparse[0])
    for delta in sparse:
        total += delta
    elected = torch.where(total >= 0, 1.0, -1.0)
    total.zero_()
    counts = torch.zeros_like(total)
    for delta, weight in zip(sparse, weights, strict=True):
        agrees = delta.sign() == elected
        total += torch.where(agrees, weight * delta, 0.0)
        counts += agrees
    return total / counts.clamp(min=1)
