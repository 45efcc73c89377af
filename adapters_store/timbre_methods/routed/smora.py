"""SMoRA: a LoRA whose ranks are its experts, of which a router chooses a few for each token.

    y = W x + b + s B (g(x) ∘ A x)

The router's logits ``l = R x`` have one entry for each rank. With a balance bias c, the ranks with the
largest ``l + c`` are kept; c is for this choice alone. The paper leaves open what the gate of a kept rank is,
so the config says it: its ``softmax`` over all ranks, that ``renormalised`` over those kept, or ``one``.

Legend: T tokens, I in features, O out features, R ranks.

Paper: arXiv 2501.15103.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    check_top_k,
    largest,
    plain_output,
    single_ranks,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

ROUTER, BALANCE = "router.weight", "router.balance_bias"
KEYS = frozenset({*FACTORS, ROUTER, BALANCE})

Gate = Literal["softmax", "renormalised", "one"]


class SmoraConfig(PeftConfig):
    """All of it matters, and nothing has a default."""

    r: NumExperts
    top_k: NumExperts
    gate: Gate
    scale: Finite
    balance_bias: bool


class Smora(Method[SmoraConfig]):
    name = "smora"
    paper = "arXiv 2501.15103"
    stored = "A [r, in], B [out, r], router [r, in]; a balance bias [r]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SMORA"

    def parse(self, raw_config: Mapping[str, Any]) -> SmoraConfig:
        config = read_config(SmoraConfig, raw_config)
        check_top_k("SMORA", "top_k", config.top_k, config.r)
        return config

    def compile(self, config: SmoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        keys = KEYS if config.balance_bias else KEYS - {BALANCE}
        found = tensors_by_site(tensors, sites, keys)
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: SmoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        logits_TR = torch.einsum("ri,ti->tr", own[ROUTER], x_TI)
        gates_TR = torch.softmax(logits_TR, 1) if config.gate != "one" else torch.ones_like(logits_TR)
        gates_TR = gates_TR * largest(logits_TR + own.get(BALANCE, 0.0), config.top_k)
        if config.gate == "renormalised":
            gates_TR = gates_TR / gates_TR.sum(1, keepdim=True)
        a_RI, b_OR = (own[key] for key in FACTORS)
        return y_TO + config.scale * torch.einsum("or,tr,ri,ti->to", b_OR, gates_TR, a_RI, x_TI)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Router and balance bias are far from zero by what all ranks share, which counts for nothing, so
        that a change by a few per cent of them shows in the choice."""
        chosen, tensors = chosen_sites(sites, generator), {}
        rank, has_balance = whole_number(4, 6, generator), coin(generator)
        for site in chosen:
            stem = f"{PREFIX}{site.path}."
            tensors[stem + FACTORS[0]] = random_tensor((rank, site.in_features), generator)
            tensors[stem + FACTORS[1]] = random_tensor((site.out_features, rank), generator)
            shared = 60 * random_tensor((1, site.in_features), generator)
            tensors[stem + ROUTER] = shared + random_tensor((rank, site.in_features), generator)
            if has_balance:
                tensors[stem + BALANCE] = 200 + 4 * random_tensor((rank,), generator)
        options = {
            "r": rank,
            "top_k": whole_number(2, 3, generator),
            "gate": ("softmax", "renormalised", "one")[whole_number(0, 2, generator)],
            "scale": whole_number(1, 8, generator) / 4,
            "balance_bias": has_balance,
        }
        return peft_file("SMORA", chosen, options), tensors


def _routed(config: SmoraConfig, found: SiteTensors) -> Routed:
    a_RI = found.need(FACTORS[0], (config.r, found.site.in_features)).to(torch.float32, copy=True)
    b_OR = found.need(FACTORS[1], (found.site.out_features, config.r)).to(torch.float32) * config.scale
    router = Router(
        found.need(ROUTER, (config.r, found.site.in_features)).to(torch.float32, copy=True),
        Rule(keep="top_k", top_k=config.top_k, gate=config.gate),
    )
    if config.balance_bias:
        balance_R = found.need(BALANCE, (config.r,)).to(torch.float32, copy=True)
        router = Router(router.weight_EI, router.rule, preference_E=balance_R)
    return Routed(single_ranks(a_RI, b_OR), router)
