"""SALT: ``y = b + U relu(C) V x`` with ``C = diag(α ∘ σ_1 + β) ⊕ (diag(σ_2) + X Y)`` in place of ``W x + b``.

``W = U diag(σ) V``, all K triplets; the first r singular values σ_1 are scaled and shifted, and a low-rank
product is added to the rest. The authors' code puts the **whole** core through a ReLU, so negative entries
off the diagonal vanish and the core of the rest is no longer of low rank. What is added to the base is
``U (relu(C) − diag(σ)) V``, as one matrix: with a core of full rank no smaller form is exact.

Entries off the diagonal depend on the signs of the singular vectors, so the file brings U, σ and V.

Legend: T tokens, I in features, O out features, K min(O, I), R scaled values, L inner size of X Y.

Paper: arXiv 2503.16055.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import thin_svd
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

GAIN, SHIFT, X, Y = "trainable_scale_A", "trainable_shift_B", "trainable_X", "trainable_Y"
LEFT, SIGMA, RIGHT = "U", "S", "Vt"
KEYS = frozenset({GAIN, SHIFT, X, Y, LEFT, SIGMA, RIGHT})


class SaltConfig(PeftConfig):
    """Nothing of the config matters at inference: the shapes tell both ranks."""

    inert = frozenset({"r_lora", "rank", "ratio_salt", "seed"})


class Salt(Method[SaltConfig]):
    name = "salt"
    paper = "arXiv 2503.16055"
    stored = "α, β [r], X [k - r, l], Y [l, k - r]; U [out, k], σ [k], V [k, in]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SALT"

    def parse(self, raw_config: Mapping[str, Any]) -> SaltConfig:
        return read_config(SaltConfig, raw_config)

    def compile(self, config: SaltConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: SaltConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            rank, size = len(own[GAIN]), len(own[SIGMA])
            core_KK = torch.diag(own[SIGMA])
            for k in range(rank):
                core_KK[k, k] = own[GAIN][k] * own[SIGMA][k] + own[SHIFT][k]
            if rank < size:
                core_KK[rank:, rank:] += own[X] @ own[Y]
            core_KK = torch.nn.functional.relu(core_KK)
            weight_OI = weight_OI - own[LEFT] @ torch.diag(own[SIGMA]) @ own[RIGHT]
            weight_OI = weight_OI + own[LEFT] @ core_KK @ own[RIGHT]
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {}
        for number, site in enumerate(chosen):
            stem = PREFIX + site.path
            svd = thin_svd(site.weight_OI)
            size = len(svd.sigma_R)
            rank = size if number == 1 else whole_number(1, size - 1, generator)
            inner = whole_number(1, 3, generator)
            for key, tensor in zip((LEFT, SIGMA, RIGHT), svd, strict=True):
                tensors[f"{stem}.{key}"] = tensor.clone()
            tensors[f"{stem}.{GAIN}"] = 1 + random_tensor((rank,), generator).abs()
            tensors[f"{stem}.{SHIFT}"] = random_tensor((rank,), generator)
            if rank < size:
                tensors[f"{stem}.{X}"] = 0.5 + random_tensor((size - rank, inner), generator)
                tensors[f"{stem}.{Y}"] = random_tensor((inner, size - rank), generator)
        return peft_file("SALT", chosen, {"r_lora": 3, "rank": 4}), tensors


def _part(found: SiteTensors) -> Dense:
    site = found.site
    size = min(site.out_features, site.in_features)
    missing = next((found.name_of(key) for key in (LEFT, SIGMA, RIGHT) if key not in found.tensors), None)
    if missing:
        raise InvalidTensors(
            f"{missing} is missing: entries off the diagonal mean nothing without the singular vectors that "
            "they were trained with, whose signs no other machine finds again; save U, S and Vt"
        )
    left_OK = found.need(LEFT, (site.out_features, size)).to(torch.float32)
    sigma_K = found.need(SIGMA, (size,)).to(torch.float32)
    right_KI = found.need(RIGHT, (size, site.in_features)).to(torch.float32)
    change_KK = torch.relu(_core(found, sigma_K)) - torch.diag(sigma_K)
    return Dense(delta_OI=left_OK @ change_KK @ right_KI)


def _core(found: SiteTensors, sigma_K: Tensor) -> Tensor:
    """C [K, K], before the ReLU."""
    size = len(sigma_K)
    gain_R = found.need(GAIN, ("r",)).to(torch.float32)
    rank = len(gain_R)
    if rank > size:
        raise InvalidTensors(f"{found.name_of(GAIN)}: found {rank} values, expected at most {size}")
    shift_R = found.need(SHIFT, (rank,)).to(torch.float32)
    first_RR = torch.diag(gain_R * sigma_K[:rank] + shift_R)
    if rank == size:
        surplus = next((found.name_of(key) for key in (X, Y) if key in found.tensors), None)
        if surplus:
            raise InvalidTensors(f"{surplus} is surplus: all {size} singular values are scaled")
        return first_RR
    x = found.need(X, (size - rank, "l")).to(torch.float32)
    y = found.need(Y, (x.shape[1], size - rank)).to(torch.float32)
    core_KK = torch.zeros(size, size, device=sigma_K.device)
    core_KK[:rank, :rank] = first_RR
    core_KK[rank:, rank:] = torch.diag(sigma_K[rank:]) + x @ y
    return core_KK
