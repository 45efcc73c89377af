"""PiSSA, as PEFT saves it: LoRA that took W's largest singular part out of the base: ``M = U_r Σ_r V_rᵀ``.

The randomised variant (``pissa_niter_…``) draws from an unseeded generator and is refused by LoRA's reader.

Paper: arXiv 2404.02948 equations 2 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites
from timbre_methods.low_rank.moved_weight import MovedWeight


class Pissa(MovedWeight):
    name = "pissa"
    paper = "arXiv 2404.02948"
    stored = "A [r, in], B [out, r]"
    initialisers = frozenset({"pissa"})
    regenerated = "the largest singular part of W, at registration"

    def moved(self, site: Site, weight_OI: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
        u_OK, s_K, v_KI = torch.linalg.svd(weight_OI, full_matrices=False)
        return v_KI[:rank], u_OK[:, :rank] * s_K[:rank]

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raw_config, tensors = super().example(sites, generator)
        return {**raw_config, "init_lora_weights": "pissa"}, tensors
