"""MoLA, as MoE-PEFT saves it: at each projection ``y = W x + b + Σ_e g_e(x) s B_e (A_e x)``.

Each projection, of attention too, has a router of its own: g is softmax(R x), the ``top_k`` largest divided
by their sum, the others 0. ``s`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
`moe_peft` has the format.

Legend: T tokens, I in features, O out features, E experts, K kept experts.

Paper: arXiv 2402.08562; code: github.com/TUDB-Labs/MoE-PEFT, moe_peft/adapters/mola.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.routed import moe_peft
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    check_top_k,
    expert_deltas,
    expert_keys,
    experts_of_one_size,
    plain_output,
)
from timbre_methods.routed.moe_peft import GATE, MoePeftConfig
from timbre_methods.routing import Routed, Rule
from timbre_methods.site_tensors import SiteTensors

MIXTURE = "mola"


class MolaConfig(MoePeftConfig):
    """The defaults are MoE-PEFT's."""

    routing_strategy: Literal["mola"] = "mola"
    top_k: NumExperts = 2


class Mola(Method[MolaConfig]):
    name = "mola"
    paper = "arXiv 2402.08562; MoE-PEFT"
    stored = "router [E, in], E times A [r, in], B [out, r]"
    checked_against = "the released code's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MOLA"

    def parse(self, raw_config: Mapping[str, Any]) -> MolaConfig:
        config = read_config(MolaConfig, raw_config)
        check_top_k("MOLA", "top_k", config.top_k, config.num_experts)
        return config

    def compile(self, config: MolaConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = moe_peft.found_in_layers(MIXTURE, tensors, sites)
        return AdapterProgram({each.site.path: (self._mixture(config, each),) for each in found})

    def _mixture(self, config: MolaConfig, found: SiteTensors) -> Routed:
        keys = expert_keys(config.num_experts) | {GATE}
        found.refuse_others(keys, f"each layer has a router and {config.num_experts} experts")
        rule = Rule(keep="top_k", top_k=config.top_k, gate="renormalised")
        router = moe_peft.router_of(found, config.num_experts, rule)
        return Routed(experts_of_one_size(found, config.num_experts, config.lora), router)

    def reference(self, config: MolaConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = moe_peft.tensors_of_layer(MIXTURE, tensors, site, x_TI.dtype)
        if own:
            gates_TE = renormalised_reference(x_TI, own[GATE], config.top_k)
            gates_TE = config.lora.scale * gates_TE
            for gate_T, delta_OI in zip(gates_TE.T, expert_deltas(own, config.num_experts), strict=True):
                y_TO = y_TO + gate_T.unsqueeze(1) * torch.einsum("oi,ti->to", delta_OI, x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(moe_peft.layers_among(sites), generator)
        num_experts = whole_number(2, 5, generator)
        options = moe_peft.example_options(generator)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            tensors |= moe_peft.example_gate(MIXTURE, site, num_experts, generator)
            tensors |= moe_peft.example_experts(MIXTURE, site, num_experts, options["r"], generator)
        return {
            "peft_type": "MOLA",
            **options,
            "target_modules": moe_peft.target_names(chosen),
            "routing_strategy": "mola",
            "num_experts": num_experts,
            "top_k": whole_number(1, num_experts, generator),
        }, tensors


def renormalised_reference(x_TI: Tensor, router_EI: Tensor, top_k: int) -> Tensor:
    """The gates [T, E] of the ``top_k``. For references only."""
    probability_TE = torch.softmax(torch.einsum("ei,ti->te", router_EI, x_TI), dim=1)
    kept_TK, expert_TK = probability_TE.topk(top_k, dim=1)
    share_TK = kept_TK / kept_TK.sum(dim=1, keepdim=True)
    return torch.zeros_like(probability_TE).scatter(1, expert_TK, share_TK)
