"""LQ-LoRA on a base that is not quantised: ``y = W x + b + s B A x − L1 L2 x``, with ``s = alpha / r``.

The paper splits ``W ≈ Q + L1 L2``, keeps Q quantised, starts the low-rank pair at ``(L1, L2)`` and trains it:
its layer is ``Q x + s B A x``. This server holds W for everyone, so the split's own product is taken off
again. That is the paper's layer but for what Q rounds away, ``W − Q − L1 L2``, which no small file holds; the
adapter runs on the better weight.

Legend: T tokens, I in features, O out features, R rank of the trained pair, S rank of the split.

Paper: arXiv 2311.12023 equation 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
SPLIT_1, SPLIT_2 = "lq_L1", "lq_L2"
KEYS = frozenset({LORA_A, LORA_B, SPLIT_1, SPLIT_2})


class LqLoraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are those of the released code."""

    inert = frozenset({"lora_dropout"})

    r: Rank
    lora_alpha: Finite = 16.0


class LqLora(Method[LqLoraConfig]):
    name = "lq_lora"
    paper = "arXiv 2311.12023"
    stored = "A [r, in], B [out, r]; L1 [out, s], L2 [s, in] of the split"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LQ_LORA"

    def parse(self, raw_config: Mapping[str, Any]) -> LqLoraConfig:
        return read_config(LqLoraConfig, raw_config)

    def compile(self, config: LqLoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: LqLoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            kept_OI = weight_OI - torch.einsum("os,si->oi", own[SPLIT_1], own[SPLIT_2])
            trained_OI = torch.einsum("or,ri->oi", own[LORA_B], own[LORA_A])
            weight_OI = kept_OI + config.lora_alpha / config.r * trained_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        r = whole_number(1, 4, generator)
        for site in chosen:
            split, stem = whole_number(1, 4, generator), PREFIX + site.path
            tensors[f"{stem}.{LORA_A}"] = random_tensor((r, site.in_features), generator)
            tensors[f"{stem}.{LORA_B}"] = random_tensor((site.out_features, r), generator)
            tensors[f"{stem}.{SPLIT_1}"] = random_tensor((site.out_features, split), generator)
            tensors[f"{stem}.{SPLIT_2}"] = random_tensor((split, site.in_features), generator)
        options = {"r": r, "lora_alpha": whole_number(1, 16, generator), "lora_dropout": 0.0, "bias": "none"}
        return peft_file("LQ_LORA", chosen, options), tensors


def _part(config: LqLoraConfig, found: SiteTensors) -> LowRank:
    site = found.site
    a_RI = found.need(LORA_A, (config.r, site.in_features)).to(torch.float32)
    b_OR = found.need(LORA_B, (site.out_features, config.r)).to(torch.float32)
    l1_OS = found.need(SPLIT_1, (site.out_features, "s")).to(torch.float32)
    l2_SI = found.need(SPLIT_2, (l1_OS.shape[1], site.in_features)).to(torch.float32)
    s = config.lora_alpha / config.r
    return LowRank(a_RI=torch.cat([a_RI, l2_SI]), b_OR=torch.cat([s * b_OR, -l1_OS], dim=1))
