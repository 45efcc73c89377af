"""MoLoRA: a mixture of LoRAs at each layer, of which all act.

    y = W x + b + (alpha / r) Σ_e p_e B_e A_e x,  p = softmax(R x)

With ``top_k`` the largest p alone act, as they are: they are not divided by their sum.

Legend: T tokens, I in features, O out features, R rank, E experts.

Paper: arXiv 2309.05444 section 3; the released code for the scale and for top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Count, Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.routed.low_rank_experts import check_top_k, largest, plain_output
from timbre_methods.routing import MAX_EXPERTS, Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B, ROUTER = "molora_A", "molora_B", "molora_router"
KEYS = frozenset({A, B, ROUTER})


class MoloraConfig(PeftConfig):
    r: Rank
    lora_alpha: Finite
    top_k: Count | None = None


class Molora(Method[MoloraConfig]):
    name = "molora"
    paper = "arXiv 2309.05444"
    stored = "A [E, r, in], B [E, out, r], router [E, in]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MOLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> MoloraConfig:
        return read_config(MoloraConfig, raw_config)

    def compile(self, config: MoloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: MoloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        gates_TE = reference_shares(own[ROUTER], config.top_k, x_TI)
        change_TO = torch.einsum("te,eor,eri,ti->to", gates_TE, own[B], own[A], x_TI)
        return y_TO + config.lora_alpha / config.r * change_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        rank, is_sparse = whole_number(1, 3, generator), coin(generator)
        for site in chosen:
            num_experts, stem = whole_number(2, 4, generator), f"{PREFIX}{site.path}."
            tensors[stem + A] = random_tensor((num_experts, rank, site.in_features), generator)
            tensors[stem + B] = random_tensor((num_experts, site.out_features, rank), generator)
            tensors[stem + ROUTER] = random_tensor((num_experts, site.in_features), generator)
        options = {
            "r": rank,
            "lora_alpha": whole_number(1, 16, generator),
            "top_k": whole_number(1, 2, generator) if is_sparse else None,
        }
        return peft_file("MOLORA", chosen, options), tensors


def read_router(found: SiteTensors, key: str, top_k: int | None) -> Router:
    """A router whose softmax over all experts is their share, of all of them or of the ``top_k``.

    Raises `InvalidTensors` for too many experts, and `InvalidConfig` for too few.
    """
    weight_EI = found.need(key, ("E", found.site.in_features)).to(torch.float32, copy=True)
    num_experts = len(weight_EI)
    if num_experts > MAX_EXPERTS:
        raise InvalidTensors(f"{found.name_of(key)}: found {num_experts} experts, expected <= {MAX_EXPERTS}")
    check_top_k(found.name_of(key), "top_k", top_k or 1, num_experts)
    keep: Literal["all", "top_k"] = "all" if top_k is None else "top_k"
    return Router(weight_EI, Rule(keep=keep, top_k=top_k or 1, gate="softmax"))


def reference_shares(router_EI: Tensor, top_k: int | None, x_TI: Tensor) -> Tensor:
    """The gates of such a router [T, E], in x's dtype."""
    shares_TE = torch.softmax(torch.einsum("ei,ti->te", router_EI, x_TI), 1)
    return shares_TE if top_k is None else shares_TE * largest(shares_TE, top_k)


def _routed(config: MoloraConfig, found: SiteTensors) -> Routed:
    site = found.site
    a_ERI = found.need(A, ("E", config.r, site.in_features)).to(torch.float32, copy=True)
    b_EOR = found.need(B, (len(a_ERI), site.out_features, config.r)).to(torch.float32)
    b_EOR = b_EOR * (config.lora_alpha / config.r)
    router = read_router(found, ROUTER, config.top_k)
    if router.num_experts != len(a_ERI):
        raise InvalidTensors(
            f"{found.name_of(ROUTER)}: found {router.num_experts} experts, expected {len(a_ERI)} as in {A}"
        )
    return Routed(
        tuple((LowRank(a_RI, b_OR),) for a_RI, b_OR in zip(a_ERI, b_EOR, strict=True)),
        router,
    )
