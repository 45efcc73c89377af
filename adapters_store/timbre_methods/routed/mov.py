"""MoV: a mixture of (IA)3 vectors, which scales a layer's output.

    y = (Σ_e p_e v_e) ∘ (W x + b),  p = softmax(R x)

With ``top_k`` the largest p alone act, as they are: then they do not add up to 1, and the output shrinks with
what was left out. As a change of the output that is ``Σ_e p_e ((v_e + 1) − 1) ∘ y0 − y0``; of all experts,
where the p do add up, ``Σ_e p_e (v_e − 1) ∘ y0``.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2309.05444 section 3; the released code for top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal, Part
from timbre_methods.routed.low_rank_experts import plain_output
from timbre_methods.routed.molora import read_router, reference_shares
from timbre_methods.routing import Routed
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

GAIN, ROUTER = "mov_gain", "mov_router"
KEYS = frozenset({GAIN, ROUTER})


class MovConfig(PeftConfig):
    top_k: Count | None = None


class Mov(Method[MovConfig]):
    name = "mov"
    paper = "arXiv 2309.05444"
    stored = "gains [E, out], router [E, in]"
    scales_bias = True
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MOV"

    def parse(self, raw_config: Mapping[str, Any]) -> MovConfig:
        return read_config(MovConfig, raw_config)

    def compile(self, config: MovConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: _parts(config, each) for each in found})

    def reference(self, config: MovConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        return (reference_shares(own[ROUTER], config.top_k, x_TI) @ own[GAIN]) * y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors, is_sparse = chosen_sites(sites, generator), {}, coin(generator)
        for site in chosen:
            num_experts, stem = whole_number(2, 4, generator), f"{PREFIX}{site.path}."
            tensors[stem + GAIN] = 1 + random_tensor((num_experts, site.out_features), generator)
            tensors[stem + ROUTER] = random_tensor((num_experts, site.in_features), generator)
        return peft_file("MOV", chosen, {"top_k": 2 if is_sparse else None}), tensors


def _parts(config: MovConfig, found: SiteTensors) -> tuple[Part, ...]:
    router = read_router(found, ROUTER, config.top_k)
    gain_EO = found.need(GAIN, (router.num_experts, found.site.out_features)).to(torch.float32, copy=True)
    if config.top_k is None:
        return (Routed(_experts(gain_EO), router),)
    nothing_left = Diagonal("output", gain=torch.zeros_like(gain_EO[0]))
    return nothing_left, Routed(_experts(gain_EO + 1), router)


def _experts(gain_EO: Tensor) -> tuple[tuple[Diagonal], ...]:
    return tuple((Diagonal("output", gain=gain_O),) for gain_O in gain_EO)
