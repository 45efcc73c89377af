"""Parts that put an adapter's own values in the place of a layer's, as changes to them.

Every kind of layer is linear in its own weight and bias, so ``y_k − y0`` is what the differences do, and a
mix of replaced layers is exact: ``W + Σ w (W_k − W)``. Knows no file format.

Legend: O out features, I in features, K tokens, V vocabulary, D size of a norm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Block, Dense, Diagonal, Part, Sparse, TokenRows
from timbre_methods.site_tensors import SiteTensors


def replacement(found: SiteTensors, prefix: str = "") -> tuple[Part, ...]:
    """The parts that replace a site's weight, its bias or both by the file's ``weight`` and ``bias``, which
    have the base's own shapes. ``prefix`` stands before these keys."""
    site = found.site
    parts: list[Part] = []
    weight = found.get(f"{prefix}weight", stored_shape(site))
    if weight is not None:
        parts.append(_changed_weight(site, weight))
    key = f"{prefix}bias"
    if key in found.tensors:
        if site.bias_O is None:
            raise InvalidTensors(f"{found.name_of(key)} is surplus: this layer of the base has no bias")
        bias_O = found.need(key, (site.out_features,))
        shift_O = bias_O.to(torch.float32) - _beside(site.bias_O, bias_O)
        parts.append(Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O))
    return tuple(parts)


def replaced_tokens(site: Site, rows_KI: Tensor, tokens: Sequence[int]) -> Part:
    """The part that replaces what an embedding or a head holds for some tokens, all different."""
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    device = rows_KI.device
    tokens_K = torch.tensor([tokens[k] for k in order], dtype=torch.int64, device=device)
    rows_KI = rows_KI.to(torch.float32)[torch.tensor(order, device=device)]
    table = site.weight_OI.T if site.kind == "embedding" else site.weight_OI
    change_KI = rows_KI - _beside(table[tokens_K.to(table.device)], rows_KI)
    if site.kind == "embedding":
        return TokenRows(tokens_K, change_KI)
    return Block(side="output", index_N=tokens_K, block=change_KI, out_features=site.out_features)


def stored_shape(site: Site) -> tuple[int, ...]:
    """The shape in which the base, and so a file, holds a site's weight."""
    shape = tuple(site.weight_OI.shape)
    return shape[::-1] if site.is_transposed else shape


def _changed_weight(site: Site, weight: Tensor) -> Part:
    oriented = weight.T if site.is_transposed else weight
    change = oriented.to(torch.float32) - _beside(site.weight_OI, weight)
    if site.kind == "linear":
        return Dense(change)
    if site.kind == "embedding":
        return TokenRows(torch.arange(site.in_features, device=weight.device), change.T)
    places = torch.arange(site.out_features + 1, device=weight.device)
    return Sparse(places, places[:-1].to(torch.int32), change, site.in_features)


def _beside(base: Tensor, given: Tensor) -> Tensor:
    """Values of the base in float32, where the file's are."""
    return base.to(given.device, torch.float32)
