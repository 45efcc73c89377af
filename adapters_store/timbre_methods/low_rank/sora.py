"""SoRA: a LoRA whose ranks training has gated, ``ΔW = (alpha / r) B diag(g) A``.

``r`` is the rank before pruning, whatever is left of it in the file. The gate [1, R] is folded into B.

Legend: T tokens, I in features, O out features, R ranks that are left.

Paper: arXiv 2311.11696 equations 4 and 5; keys as in its public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"lora_A", "lora_B", "gate"})


class SoraConfig(PeftConfig):
    r: Rank
    lora_alpha: Finite


class Sora(Method[SoraConfig]):
    name = "sora"
    paper = "arXiv 2311.11696"
    stored = "A [r', in], B [out, r'], gate [1, r']"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SORA"

    def parse(self, raw_config: Mapping[str, Any]) -> SoraConfig:
        return read_config(SoraConfig, raw_config)

    def compile(self, config: SoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_factors(config, each),) for each in found})

    def reference(self, config: SoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            gated_RI = torch.diag(own["gate"][0]) @ own["lora_A"]
            weight_OI = weight_OI + config.lora_alpha / config.r * own["lora_B"] @ gated_RI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        for site in chosen:
            left, stem = whole_number(1, 4, generator), f"{PREFIX}{site.path}"
            tensors[f"{stem}.lora_A"] = random_tensor((left, site.in_features), generator)
            tensors[f"{stem}.lora_B"] = random_tensor((site.out_features, left), generator)
            tensors[f"{stem}.gate"] = 0.3 + random_tensor((1, left), generator)
        options = {"r": whole_number(4, 8, generator), "lora_alpha": whole_number(4, 16, generator)}
        return peft_file("SORA", chosen, options), tensors


def _factors(config: SoraConfig, found: SiteTensors) -> LowRank:
    a_RI = found.need("lora_A", ("r", found.site.in_features))
    rank = a_RI.shape[0]
    if rank > config.r:
        raise InvalidTensors(
            f"{found.name_of('lora_A')}: found rank {rank}, expected at most the config's r, {config.r}"
        )
    b_OR = found.need("lora_B", (found.site.out_features, rank)).to(torch.float32)
    gate_1R = found.need("gate", (1, rank)).to(torch.float32)
    return LowRank(a_RI.to(torch.float32, copy=True), b_OR * gate_1R * (config.lora_alpha / config.r))
