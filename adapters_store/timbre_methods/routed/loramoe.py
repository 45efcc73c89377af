"""LoRAMoE, as MoE-PEFT saves it: ``y = W x + b + Σ_e g_e(x) s B_e (A_e x)`` at a projection.

g = softmax(R x): all experts act on each row. Each projection of an MLP has a router of its own; those of
attention may have a plain LoRA, ``y = W x + b + s B (A x)``. ``s`` is ``lora_alpha / r``, or
``lora_alpha / sqrt(r)`` with ``use_rslora``. `moe_peft` has the format.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2312.09979; code: github.com/TUDB-Labs/MoE-PEFT, moe_peft/adapters/loramoe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.routed import moe_peft
from timbre_methods.routed.low_rank_experts import expert_deltas, expert_keys, experts_of_one_size, only_lora
from timbre_methods.routed.moe_peft import GATE, MoePeftConfig
from timbre_methods.routing import Routed, Rule
from timbre_methods.site_tensors import SiteTensors

MIXTURE = "loramoe"


class LoraMoeConfig(MoePeftConfig):
    """The defaults are MoE-PEFT's."""

    routing_strategy: Literal["loramoe"] = "loramoe"


class LoraMoe(Method[LoraMoeConfig]):
    name = "loramoe"
    paper = "arXiv 2312.09979; MoE-PEFT"
    stored = "router [E, in], E times A [r, in], B [out, r]"
    checked_against = "the released code's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LORAMOE"

    def parse(self, raw_config: Mapping[str, Any]) -> LoraMoeConfig:
        return read_config(LoraMoeConfig, raw_config)

    def compile(self, config: LoraMoeConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = moe_peft.found_in_layers(MIXTURE, tensors, sites)
        return AdapterProgram({each.site.path: (self._part(config, each),) for each in found})

    def _part(self, config: LoraMoeConfig, found: SiteTensors) -> LowRank | Routed:
        if any(key in found.tensors for key in FACTORS):
            return only_lora(found, FACTORS, config.lora)
        keys = expert_keys(config.num_experts) | {GATE}
        found.refuse_others(keys, f"the config says num_experts={config.num_experts}")
        router = moe_peft.router_of(found, config.num_experts, Rule())
        return Routed(experts_of_one_size(found, config.num_experts, config.lora), router)

    def reference(self, config: LoraMoeConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = torch.einsum("oi,ti->to", site.weight_OI.to(x_TI.dtype), x_TI)
        own = moe_peft.tensors_of_layer(MIXTURE, tensors, site, x_TI.dtype)
        if GATE in own:
            logits_TE = torch.einsum("ei,ti->te", own[GATE], x_TI)
            gates_TE = config.lora.scale * torch.softmax(logits_TE, dim=1)
            for gate_T, delta_OI in zip(gates_TE.T, expert_deltas(own, config.num_experts), strict=True):
                y_TO = y_TO + gate_T.unsqueeze(1) * torch.einsum("oi,ti->to", delta_OI, x_TI)
        elif own:
            delta_OI = config.lora.scale * torch.einsum("or,ri->oi", own[FACTORS[1]], own[FACTORS[0]])
            y_TO = y_TO + torch.einsum("oi,ti->to", delta_OI, x_TI)
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        layers = moe_peft.layers_among(sites)
        of_mlps = {path: site for path, site in layers.items() if ".mlp." in path}
        chosen = chosen_sites(of_mlps, generator)
        num_experts = whole_number(2, 5, generator)
        options = moe_peft.example_options(generator)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            tensors |= moe_peft.example_gate(MIXTURE, site, num_experts, generator)
            tensors |= moe_peft.example_experts(MIXTURE, site, num_experts, options["r"], generator)
        for site in chosen_sites({p: site for p, site in layers.items() if p not in of_mlps}, generator)[1:]:
            tensors |= moe_peft.example_plain(MIXTURE, site, options["r"], generator)
            chosen.append(site)
        return {
            "peft_type": "LORAMOE",
            **options,
            "target_modules": moe_peft.target_names(chosen),
            "routing_strategy": "loramoe",
            "num_experts": num_experts,
        }, tensors
