"""PHATGOOSE: LoRAs trained alone, each with a gate vector by which tokens find it afterwards.

    l_e = LN(v_e) · LN(x) / sqrt(I),  y = W x + b + Σ_e g_e (B_e A_e x) / r_e

LN has no weight (mean 0, variance 1, epsilon 1e-5). g is the softmax of l over the ``top_k`` largest, two in
the paper: the softmax over all, divided by the sum of those kept.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2402.05859 section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    check_top_k,
    example_experts,
    expert_keys,
    largest,
    plain_output,
    read_experts,
    reference_deltas,
    scaled_experts,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site

GATES = "gate_vector"
EPSILON = 1e-5


class PhatgooseConfig(PeftConfig):
    num_experts: NumExperts
    top_k: NumExperts = 2


class Phatgoose(Method[PhatgooseConfig]):
    name = "phatgoose"
    paper = "arXiv 2402.05859"
    stored = "of each expert A [r, in] and B [out, r]; gate vectors [E, in]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PHATGOOSE"

    def parse(self, raw_config: Mapping[str, Any]) -> PhatgooseConfig:
        config = read_config(PhatgooseConfig, raw_config)
        check_top_k("PHATGOOSE", "top_k", config.top_k, config.num_experts)
        return config

    def compile(self, config: PhatgooseConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        keys = expert_keys(config.num_experts) | {GATES}
        found = tensors_by_site(tensors, sites, keys)
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: PhatgooseConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        deltas = reference_deltas(tensors, site, config.num_experts, x_TI.dtype)
        if not deltas:
            return y_TO
        v_EI = tensors[f"{PREFIX}{site.path}.{GATES}"].to(x_TI.dtype)
        logits_TE = torch.einsum("ti,ei->te", _centred(x_TI), _centred(v_EI)) / math.sqrt(site.in_features)
        shares_TE = torch.softmax(logits_TE, 1) * largest(logits_TE, config.top_k)
        gates_TE = shares_TE / shares_TE.sum(1, keepdim=True)
        for e, delta_OI in enumerate(deltas):
            rank = len(tensors[f"{PREFIX}{site.path}.experts.{e}.lora_A.weight"])
            y_TO = y_TO + gates_TE[:, e : e + 1] * torch.einsum("oi,ti->to", delta_OI, x_TI) / rank
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, num_experts = chosen_sites(sites, generator), whole_number(2, 3, generator)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            tensors |= example_experts(site, num_experts, generator)
            tensors[f"{PREFIX}{site.path}.{GATES}"] = random_tensor(
                (num_experts, site.in_features), generator
            )
        options = {"num_experts": num_experts, "top_k": 2}
        return peft_file("PHATGOOSE", chosen, options), tensors


def _routed(config: PhatgooseConfig, found: SiteTensors) -> Routed:
    features = found.site.in_features
    v_EI = found.need(GATES, (config.num_experts, features)).to(torch.float32)
    rule = Rule(
        reads="normalised",
        scale=1 / math.sqrt(features),
        keep="top_k",
        top_k=config.top_k,
        gate="renormalised",
    )
    router = Router(torch.nn.functional.layer_norm(v_EI, (features,), eps=EPSILON), rule)
    experts = read_experts(found, config.num_experts)
    return Routed(scaled_experts(experts, [1 / len(a_RI) for a_RI, _ in experts]), router)


def _centred(v_NI: Tensor) -> Tensor:
    """LN, for the reference."""
    deviation_NI = v_NI - v_NI.mean(1, keepdim=True)
    return deviation_NI / torch.sqrt(deviation_NI.square().mean(1, keepdim=True) + EPSILON)
