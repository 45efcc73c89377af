"""LoRA-SB: ``y = W x + b + s B R A x``, LoRA-XS whose A and B come from early gradients.

Nothing can be computed again, and no two adapters share a basis, so R is folded into B: a plain LoRA. The
first R is not zero and is not subtracted from the base.

Legend: O out features, I in features, R rank.

Paper: arXiv 2411.19557.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.shared_basis.lora_xs import (
    KEYS,
    LatentConfig,
    latent_example,
    latent_reference,
    read_latent,
    with_core_names,
)
from timbre_methods.site_tensors import SiteTensors, tensors_by_site


class LoraSb(Method[LatentConfig]):
    name = "lora_sb"
    paper = "arXiv 2411.19557"
    stored = "A [r, in], B [out, r], R [r, r]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LORA_SB"

    def parse(self, raw_config: Mapping[str, Any]) -> LatentConfig:
        return read_config(LatentConfig, raw_config)

    def compile(self, config: LatentConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: (_factors(config, found),)
                for found in tensors_by_site(with_core_names(tensors), sites, KEYS)
            }
        )

    def reference(self, config: LatentConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        return latent_reference(config, tensors, site, x_TI)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return latent_example("LORA_SB", sites, generator)


def _factors(config: LatentConfig, found: SiteTensors) -> LowRank:
    a_RI, b_OR, core_RR = read_latent(config, found)
    return LowRank(a_RI=a_RI.clone(), b_OR=b_OR @ core_RR)
