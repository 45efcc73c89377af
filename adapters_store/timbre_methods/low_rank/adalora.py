"""AdaLoRA, as PEFT saves it: ``y = W x + b + s B diag(e) A x``, with a rank of its own for every layer.

``s = alpha / (init_r + 1e-5)``: alpha is divided by the rank that training began with, not by what is left of
it; an alpha that is not positive stands for what is left. ``rank_pattern`` says for each layer which of the
first ``init_r`` triplets training kept; the file holds these alone. A layer that kept none is the base's.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2303.10512 section 3.1.
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

KEYS = frozenset({"lora_A", "lora_B", "lora_E"})


class AdaloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    # PEFT writes LoRA's whole config too, and its AdaLoRA reads neither r, nor alpha_pattern, nor use_rslora.
    inert = frozenset(
        {
            "alpha_pattern",
            "beta1",
            "beta2",
            "corda_config",
            "deltaT",
            "eva_config",
            "init_lora_weights",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_core",
            "orth_reg_weight",
            "qalora_group_size",
            "r",
            "runtime_config",
            "target_r",
            "tfinal",
            "tinit",
            "total_step",
            "use_rslora",
        }
    )

    init_r: Rank = 12
    lora_alpha: Finite = 8.0
    rank_pattern: dict[str, list[bool]] | None = None


class Adalora(Method[AdaloraConfig]):
    name = "adalora"
    paper = "arXiv 2303.10512"
    stored = "A [r, in], E [r, 1], B [out, r]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ADALORA"

    def parse(self, raw_config: Mapping[str, Any]) -> AdaloraConfig:
        return read_config(AdaloraConfig, raw_config)

    def compile(self, config: AdaloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts = {found.site.path: _part(config, found) for found in tensors_by_site(tensors, sites, KEYS)}
        return AdapterProgram({path: (part,) for path, part in parts.items() if part.a_RI.shape[0] > 0})

    def reference(self, config: AdaloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            lambda_RI = own["lora_A"] * own["lora_E"]
            top = config.lora_alpha if config.lora_alpha > 0 else lambda_RI.shape[0]
            delta_OI = torch.einsum("or,ri->oi", own["lora_B"], lambda_RI)
            y_TO = y_TO + torch.einsum("oi,ti->to", delta_OI, x_TI) * top / (config.init_r + 1e-5)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        init_r = whole_number(3, 6, generator)
        tensors, kept = {}, {}
        for number, site in enumerate(chosen):
            rank = init_r
            if number % 2 == 1:
                rank = whole_number(1, init_r - 1, generator)
                kept[f"{site.path}.lora_E"] = [place < rank for place in range(init_r)]
            stem = PREFIX + site.path
            tensors[f"{stem}.lora_A"] = random_tensor((rank, site.in_features), generator)
            tensors[f"{stem}.lora_B"] = random_tensor((site.out_features, rank), generator)
            tensors[f"{stem}.lora_E"] = 1 + random_tensor((rank, 1), generator)
        options = {
            "init_r": init_r,
            "lora_alpha": whole_number(0, 8, generator),
            "rank_pattern": kept or None,
            "r": 8,
            "target_r": 2,
            "total_step": 100,
            "lora_dropout": 0.1,
            "use_rslora": False,
            "alpha_pattern": {},
            "bias": "none",
            "modules_to_save": None,
        }
        return peft_file("ADALORA", chosen, options), tensors


def _part(config: AdaloraConfig, found: SiteTensors) -> LowRank:
    site = found.site
    kept = (config.rank_pattern or {}).get(f"{site.path}.lora_E")
    rank = config.init_r if kept is None else sum(kept)
    a_RI = found.need("lora_A", (rank, site.in_features))
    b_OR = found.need("lora_B", (site.out_features, rank))
    e_R = found.need("lora_E", (rank, 1)).to(torch.float32)[:, 0]
    s = (config.lora_alpha if config.lora_alpha > 0 else rank) / (config.init_r + 1e-5)
    return LowRank(a_RI=a_RI.to(torch.float32, copy=True), b_OR=b_OR.to(torch.float32) * (s * e_R))
