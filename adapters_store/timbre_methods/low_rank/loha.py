"""LoHa, as PEFT saves it: ``y = W x + b + s ((a1 b1) * (a2 b2)) x``, two low ranks multiplied element-wise.

Such a product is itself low-rank: column (i, j) of its left factor is ``a1[:, i] * a2[:, j]``, row (i, j) of
its right one ``b1[i] * b2[j]``. So it is served as rank r² while that is the smaller form, and as ΔW above.

Legend: T tokens, I in features, O out features, R rank.

Papers: arXiv 2108.06098 (FedPara) proposition 1; PEFT's format follows arXiv 2309.14859 (LyCORIS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.lycoris import (
    LycorisConfig,
    Patterns,
    lycoris_options,
    read_lycoris_config,
    reference_scale,
)
from timbre_methods.low_rank.ranks import check_rank, factors_are_smaller
from timbre_methods.program import AdapterProgram, Dense, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})


class Loha(Method[LycorisConfig]):
    name = "loha"
    paper = "arXiv 2108.06098"
    stored = "a1 and a2 [out, r], b1 and b2 [r, in]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LOHA"

    def parse(self, raw_config: Mapping[str, Any]) -> LycorisConfig:
        return read_lycoris_config(LycorisConfig, raw_config)

    def compile(self, config: LycorisConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        patterns = Patterns(config)
        return AdapterProgram(
            {
                found.site.path: (_part(config, patterns, found),)
                for found in tensors_by_site(tensors, sites, KEYS)
            }
        )

    def reference(self, config: LycorisConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        adapted_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            left_OI = torch.einsum("or,ri->oi", own["hada_w1_a"], own["hada_w1_b"])
            right_OI = torch.einsum("or,ri->oi", own["hada_w2_a"], own["hada_w2_b"])
            adapted_OI = adapted_OI + reference_scale(config, site) * left_OI * right_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, other_r = whole_number(1, 2, generator), whole_number(3, 4, generator)
        tensors, ranks = {}, {}
        for number, site in enumerate(chosen):
            rank = other_r if number % 3 == 1 else r
            if rank != r:
                ranks[site.path] = rank
            for key in sorted(KEYS):
                shape = (site.out_features, rank) if key.endswith("a") else (rank, site.in_features)
                tensors[f"{PREFIX}{site.path}.{key}"] = 2 * random_tensor(shape, generator)
        alphas = {chosen[0].path: 3, chosen[-1].path.split(".")[-1]: 2.5}
        options = lycoris_options(r, whole_number(2, 8, generator), ranks, alphas)
        return peft_file("LOHA", chosen, options), tensors


def _part(config: LycorisConfig, patterns: Patterns, found: SiteTensors) -> Part:
    site = found.site
    a1_OR = found.need("hada_w1_a", (site.out_features, "r")).to(torch.float32)
    rank = a1_OR.shape[1]
    check_rank(found, "hada_w1_a", rank, config.r, config.rank_pattern)
    b1_RI = found.need("hada_w1_b", (rank, site.in_features)).to(torch.float32)
    a2_OR = found.need("hada_w2_a", (site.out_features, rank)).to(torch.float32)
    b2_RI = found.need("hada_w2_b", (rank, site.in_features)).to(torch.float32)
    s = patterns.scale(site.path, rank)
    if not factors_are_smaller(rank * rank, site):
        return Dense((a1_OR @ b1_RI).mul_(a2_OR @ b2_RI).mul_(s))
    return LowRank(
        a_RI=(b1_RI[:, None] * b2_RI[None]).flatten(0, 1),
        b_OR=(a1_OR[:, :, None] * (a2_OR * s)[:, None]).flatten(1, 2),
    )
