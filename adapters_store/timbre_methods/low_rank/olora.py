"""OLoRA, as PEFT saves it: LoRA that took the first part of W's QR out of the base: ``M = s Q_r R_r``.

Paper: arXiv 2406.01775 algorithm 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Sites
from timbre_methods.low_rank.moved_weight import MovedWeight


class Olora(MovedWeight):
    name = "olora"
    paper = "arXiv 2406.01775"
    stored = "A [r, in], B [out, r]"
    initialisers = frozenset({"olora"})
    regenerated = "the first part of W's QR, at registration"

    def moved(self, weight_OI: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
        q_OK, r_KI = torch.linalg.qr(weight_OI)
        return r_KI[:rank], q_OK[:, :rank] * s

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raw_config, tensors = super().example(sites, generator)
        return {**raw_config, "init_lora_weights": "olora"}, tensors
