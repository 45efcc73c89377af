"""OLoRA, as PEFT saves it: LoRA that took the first part of W's QR out of the base: ``M = s Q_r R_r``.

PEFT decomposes the weight as it is stored: of a `Conv1D`, which stores Wᵀ = Q R, ``M = s (Q_r R_r)ᵀ``. That
is no part of W's own QR, and PEFT's factors of one that is not square do not fit the layer.

Paper: arXiv 2406.01775 algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import InvalidTensors
from timbre_methods.low_rank.moved_weight import MovedWeight


class Olora(MovedWeight):
    name = "olora"
    paper = "arXiv 2406.01775"
    stored = "A [r, in], B [out, r]"
    initialisers = frozenset({"olora"})
    regenerated = "the first part of W's QR, at registration"

    def check_site(self, site: Site) -> None:
        if site.is_transposed and site.in_features != site.out_features:
            raise InvalidTensors(
                f"{site.path}: OLoRA on a Conv1D of {site.in_features} x {site.out_features} is not served: "
                "PEFT's factors fit square ones alone; train with another initialiser"
            )

    def moved(self, site: Site, weight_OI: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
        if site.is_transposed:
            q_IK, r_KO = torch.linalg.qr(weight_OI.T)
            return q_IK[:, :rank].T, r_KO[:rank].T * s
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        return r_KI[:rank], q_OK[:, :rank] * s

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raw_config, tensors = super().example(sites, generator)
        return {**raw_config, "init_lora_weights": "olora"}, tensors
