"""HiRA, as PEFT saves it: ``y = W x + b + (W * (B A)) x``, a low rank multiplied element-wise into the base.

The change has the base's rank, so it is made once, when the adapter is loaded, and kept as it is. On an
embedding that scales what it looks up, PEFT adds the change unscaled.

Legend: T tokens, I in features, O out features, R rank.

Paper: HiRA, ICLR 2025, openreview TwJrTz9cRS.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, Rank, RankPattern, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.program import AdapterProgram, Dense
from timbre_methods.site_tensors import PREFIX, SiteTensors, article, tensors_by_site, tensors_of_site

FACTORS = ("hira_A", "hira_B")
EMBEDDING_FACTORS = ("hira_embedding_A", "hira_embedding_B")
KEYS = frozenset({*FACTORS, *EMBEDDING_FACTORS})


class HiraConfig(PeftConfig):
    """The ranks; there is no scale."""

    inert = frozenset({"hira_dropout", "init_weights"})

    r: Rank = 32
    rank_pattern: RankPattern | None = None


class Hira(Method[HiraConfig]):
    name = "hira"
    paper = "openreview TwJrTz9cRS"
    stored = "A [r, in], B [out, r]"
    checked_against = "PEFT"
    kinds = frozenset({"linear", "embedding"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "HIRA"

    def parse(self, raw_config: Mapping[str, Any]) -> HiraConfig:
        return read_config(HiraConfig, raw_config)

    def compile(self, config: HiraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: HiraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, weight_OI, bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            a_RI, b_OR = (own[key] for key in factor_keys(site))
            for a_I, b_O in zip(a_RI, b_OR.T, strict=True):
                y_TO = y_TO + b_O / site.scale * torch.einsum("oi,ti->to", weight_OI, a_I * x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, other_r = whole_number(1, 3, generator), whole_number(4, 5, generator)
        tensors, ranks = {}, {}
        for number, site in enumerate(chosen):
            rank = other_r if number % 3 == 1 else r
            if rank != r:
                ranks[site.path] = rank
            key_a, key_b = factor_keys(site)
            tensors[f"{PREFIX}{site.path}.{key_a}"] = random_tensor((rank, site.in_features), generator)
            tensors[f"{PREFIX}{site.path}.{key_b}"] = random_tensor((site.out_features, rank), generator)
        options = {
            "r": r,
            "rank_pattern": ranks,
            "hira_dropout": 0.0,
            "init_weights": True,
            "modules_to_save": None,
        }
        return peft_file("HIRA", chosen, options), tensors


def factor_keys(site: Site) -> tuple[str, str]:
    """The keys of A and B: on an embedding, whose in features are tokens, they have names of their own."""
    return EMBEDDING_FACTORS if site.kind == "embedding" else FACTORS


def _part(config: HiraConfig, found: SiteTensors) -> Dense:
    site = found.site
    key_a, key_b = factor_keys(site)
    stray = next((key for key in found.tensors if key not in (key_a, key_b)), None)
    if stray is not None:
        raise InvalidTensors(f"{found.name_of(stray)} is surplus: {article(site)} has {key_a} and {key_b}")
    a_RI = found.need(key_a, ("r", site.in_features))
    rank = a_RI.shape[0]
    check_rank(found, key_a, rank, config.r, config.rank_pattern)
    b_OR = found.need(key_b, (site.out_features, rank))
    delta_OI = (b_OR.to(torch.float32) / site.scale) @ a_RI.to(torch.float32)
    return Dense(delta_OI.mul_(site.weight_OI.to(delta_OI.device)))
