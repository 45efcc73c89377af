"""IncreLoRA: a LoRA whose ranks training has added piece by piece, ``ΔW = alpha / (ρ + 1e-5) B diag(E) A``.

``ρ`` is the layer's own rank in the end. A [ρ, in], E [ρ, 1] and B [out, ρ] are the pieces of the public
code's lists, joined in their order.

Legend: T tokens, I in features, O out features, R the layer's rank.

Paper: arXiv 2308.12043 section 3; scale as in its public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"lora_A", "lora_B", "lora_E"})
MAX_RANK = 4096


class IncreloraConfig(PeftConfig):
    """The rank of each layer is in its tensors."""

    inert = frozenset({"init_r", "target_r", "r"})

    lora_alpha: Finite


class Increlora(Method[IncreloraConfig]):
    name = "increlora"
    paper = "arXiv 2308.12043"
    stored = "A [ρ, in], E [ρ, 1], B [out, ρ]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "INCRELORA"

    def parse(self, raw_config: Mapping[str, Any]) -> IncreloraConfig:
        return read_config(IncreloraConfig, raw_config)

    def compile(self, config: IncreloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_factors(config, each),) for each in found})

    def reference(self, config: IncreloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            scaled_RI = own["lora_A"] * own["lora_E"]
            rank = scaled_RI.shape[0]
            weight_OI = weight_OI + own["lora_B"] @ scaled_RI * (config.lora_alpha / (rank + 1e-5))
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        for site in chosen:
            rank, stem = whole_number(1, 5, generator), f"{PREFIX}{site.path}"
            tensors[f"{stem}.lora_A"] = random_tensor((rank, site.in_features), generator)
            tensors[f"{stem}.lora_B"] = random_tensor((site.out_features, rank), generator)
            tensors[f"{stem}.lora_E"] = 0.3 + random_tensor((rank, 1), generator)
        return peft_file("INCRELORA", chosen, {"lora_alpha": whole_number(2, 9, generator)}), tensors


def _factors(config: IncreloraConfig, found: SiteTensors) -> LowRank:
    a_RI = found.need("lora_A", ("r", found.site.in_features))
    rank = a_RI.shape[0]
    if rank > MAX_RANK:
        raise InvalidTensors(f"{found.name_of('lora_A')}: found rank {rank}, expected at most {MAX_RANK}")
    b_OR = found.need("lora_B", (found.site.out_features, rank)).to(torch.float32)
    e_R1 = found.need("lora_E", (rank, 1)).to(torch.float32)
    s = config.lora_alpha / (rank + 1e-5)
    return LowRank(a_RI.to(torch.float32, copy=True), b_OR * e_R1.T * s)
