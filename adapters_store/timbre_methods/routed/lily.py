"""Lily, as PEFT saves it: one A with several B, mixed for each token.

    h = A x,  p = softmax(R h),  y = W x + b + scaling Σ_e p_e B_e h

Layers that share an A or their B have copies in the file. PEFT averages p over all tokens of a forward call,
padding and other requests included, so that what it answers depends on who is beside and on how a prompt is
cut. Here each token has its own p, wherever it stands and whoever is beside it: what PEFT computes for a
forward of one token, as in decoding alone with a cache.

R A is folded into one router of the layer's input, and A is held once for each expert.

Legend: T tokens, I in features, O out features, R rank, E experts.

Paper: arXiv 2407.09946.
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
from timbre_methods.routed.low_rank_experts import NumExperts, plain_output
from timbre_methods.routing import Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B, ROUTER = "lily_A.weight", "lily_B.weight", "lily_router.weight"
KEYS = frozenset({A, B, ROUTER})


class LilyConfig(PeftConfig):
    """``stride_A`` says which layers share their A; the file repeats it. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "stride_A"})

    r: Rank = 32
    num_B: NumExperts = 2
    scaling: Finite = 1.0


class Lily(Method[LilyConfig]):
    name = "lily"
    paper = "arXiv 2407.09946"
    stored = "A [r, in], B [E r, out], router [E, r]"
    checked_against = "PEFT, for forwards of one token"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LILY"

    def parse(self, raw_config: Mapping[str, Any]) -> LilyConfig:
        return read_config(LilyConfig, raw_config)

    def compile(self, config: LilyConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: LilyConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        h_TR = torch.einsum("ri,ti->tr", own[A], x_TI)
        shares_TE = torch.softmax(torch.einsum("er,tr->te", own[ROUTER], h_TR), 1)
        b_ERO = own[B].view(config.num_B, config.r, -1)
        return y_TO + config.scaling * torch.einsum("te,ero,tr->to", shares_TE, b_ERO, h_TR)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        rank, num_experts = whole_number(1, 4, generator), whole_number(2, 4, generator)
        for site in chosen:
            stem = f"{PREFIX}{site.path}."
            tensors[stem + A] = random_tensor((rank, site.in_features), generator)
            tensors[stem + B] = random_tensor((num_experts * rank, site.out_features), generator)
            tensors[stem + ROUTER] = random_tensor((num_experts, rank), generator)
        options = {
            "r": rank,
            "num_B": num_experts,
            "scaling": whole_number(1, 8, generator) / 4,
            "stride_A": whole_number(1, 3, generator),
            "init_weights": True,
            "modules_to_save": None,
        }
        return peft_file("LILY", chosen, options), tensors


def _routed(config: LilyConfig, found: SiteTensors) -> Routed:
    site, rank = found.site, config.r
    a_RI = found.need(A, (rank, site.in_features)).to(torch.float32, copy=True)
    b_NO = found.need(B, (config.num_B * rank, site.out_features)).to(torch.float32) * config.scaling
    b_ERO = b_NO.view(config.num_B, rank, site.out_features)
    router_ER = found.need(ROUTER, (config.num_B, rank)).to(torch.float32)
    experts = tuple((LowRank(a_RI, b_RO.T),) for b_RO in b_ERO)
    return Routed(experts, Router(router_ER @ a_RI, Rule(keep="all", gate="softmax")))
