"""KaSA, as PEFT saves it: ``s B diag(d) A`` over a base without its smallest singular part.

``M = U_d Σ_d V_dᵀ`` holds the r smallest singular values. The rank must be smaller than the layer's.

Paper: arXiv 2412.06071 equations 4 to 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import random_tensor
from timbre_methods.low_rank.lora import LINEAR_KEYS
from timbre_methods.low_rank.moved_weight import DIAGONAL, MovedWeight, MovedWeightConfig


class KasaConfig(MovedWeightConfig):
    """The weights of training's regularisers change nothing at inference."""

    kasa_config: dict[str, Any]


class Kasa(MovedWeight):
    name = "kasa"
    paper = "arXiv 2412.06071"
    stored = "A [r, in], B [out, r], d [r]"
    regenerated = "the smallest singular part of W, at registration"
    keys = LINEAR_KEYS | {DIAGONAL}
    config = KasaConfig
    switches = frozenset({"kasa_config"})
    initialisers = frozenset({"", "gaussian", "orthogonal"})

    def moved(self, site: Site, weight_OI: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
        if rank >= min(weight_OI.shape):
            raise InvalidTensors(
                f"KaSA: found rank {rank} for a layer of {list(weight_OI.shape)}, expected less than "
                f"{min(weight_OI.shape)}: nothing of the layer would be left"
            )
        u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        return v_KI[-rank:], u_OK[:, -rank:] * s_K[-rank:]

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        # The other rank of these examples is 5 or 6.
        wide = {path: site for path, site in sites.items() if min(site.weight_OI.shape) > 6}
        raw_config, tensors = super().example(wide, generator)
        raw_config["kasa_config"] = {"beta": 1e-4, "gamma": 1e-3}
        for name, tensor in list(tensors.items()):
            if name.endswith("lora_A.weight"):
                path = name.removesuffix("lora_A.weight")
                tensors[path + DIAGONAL] = random_tensor((tensor.shape[0],), generator)
        return raw_config, tensors
