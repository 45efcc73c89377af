"""Block-LoRA: a LoRA whose A is one block repeated, ``ΔW = (alpha / r) Σ_n B_n A``, r = N K.

The sum over blocks is taken once: what is served is a plain LoRA of rank K = r / N.

Legend: T tokens, I in features, O out features, N blocks, K ranks of one block.

Paper: arXiv 2501.16720.
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

A, B = "blocklora_A", "blocklora_B"
KEYS = frozenset({A, B})


class BlockLoraConfig(PeftConfig):
    r: Rank
    lora_alpha: Finite


class BlockLora(Method[BlockLoraConfig]):
    name = "block_lora"
    paper = "arXiv 2501.16720"
    stored = "A [r / N, in], B [N, out, r / N]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "BLOCK_LORA"

    def parse(self, raw_config: Mapping[str, Any]) -> BlockLoraConfig:
        return read_config(BlockLoraConfig, raw_config)

    def compile(self, config: BlockLoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_factors(config, each),) for each in found})

    def reference(self, config: BlockLoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            blocks = list(own[B])
            delta_OI = torch.cat(blocks, dim=1) @ torch.cat([own[A]] * len(blocks))
            weight_OI = weight_OI + config.lora_alpha / config.r * delta_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        count, rank = whole_number(1, 3, generator), whole_number(1, 3, generator)
        for site in chosen:
            stem = f"{PREFIX}{site.path}"
            tensors[f"{stem}.{A}"] = random_tensor((rank, site.in_features), generator)
            tensors[f"{stem}.{B}"] = random_tensor((count, site.out_features, rank), generator)
        options = {"r": count * rank, "lora_alpha": whole_number(2, 8, generator)}
        return peft_file("BLOCK_LORA", chosen, options), tensors


def _factors(config: BlockLoraConfig, found: SiteTensors) -> LowRank:
    a_KI = found.need(A, ("k", found.site.in_features))
    b_NOK = found.need(B, ("n", found.site.out_features, a_KI.shape[0]))
    if b_NOK.shape[0] * a_KI.shape[0] != config.r:
        raise InvalidTensors(
            f"{found.name_of(B)}: found {b_NOK.shape[0]} blocks of rank {a_KI.shape[0]}, "
            f"expected a product of {config.r}, as the config says"
        )
    summed_OK = b_NOK.to(torch.float32).sum(0)
    return LowRank(a_KI.to(torch.float32, copy=True), summed_OK * (config.lora_alpha / config.r))
