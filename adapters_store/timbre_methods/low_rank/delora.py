"""DeLoRA, as PEFT saves it: ``y = W x + b + B diag(λ / (r |A_i| |B_i|)) A (w * x)``.

Directions are apart from strength: rows of A and columns of B count by their directions alone (lengths
below 1e-4 count as that), ``λ`` is learned, and ``w`` [in] are the lengths of the base's columns at
training time, from the file.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2503.18225.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, Rank, RankPattern, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"})
SHORTEST = 1e-4


class DeloraConfig(PeftConfig):
    """The ranks; the config's lambdas are where training began, the file has those that it found."""

    inert = frozenset({"delora_lambda", "init_weights", "lambda_pattern", "module_dropout"})

    r: Rank = 8
    rank_pattern: RankPattern | None = None


class Delora(Method[DeloraConfig]):
    name = "delora"
    paper = "arXiv 2503.18225"
    stored = "A [r, in], B [out, r], lambda, column lengths [in]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "DELORA"

    def parse(self, raw_config: Mapping[str, Any]) -> DeloraConfig:
        return read_config(DeloraConfig, raw_config)

    def compile(self, config: DeloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: DeloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        adapted_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            rank = own["delora_A"].shape[0]
            for a_I, b_O in zip(own["delora_A"], own["delora_B"].T, strict=True):
                length = a_I.square().sum().sqrt().clamp(min=1e-4) * b_O.square().sum().sqrt().clamp(min=1e-4)
                adapted_OI = adapted_OI + own["delora_lambda"] / (rank * length) * torch.outer(
                    b_O, a_I * own["delora_w_norm"]
                )
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, other_r = whole_number(1, 3, generator), whole_number(4, 5, generator)
        tensors, ranks = {}, {}
        for number, site in enumerate(chosen):
            rank = other_r if number % 3 == 1 else r
            if rank != r:
                ranks[site.path] = rank
            stem = PREFIX + site.path
            tensors[f"{stem}.delora_A"] = random_tensor((rank, site.in_features), generator)
            tensors[f"{stem}.delora_B"] = random_tensor((site.out_features, rank), generator)
            tensors[f"{stem}.delora_lambda"] = 10 + random_tensor((1,), generator)
            tensors[f"{stem}.delora_w_norm"] = 1 + torch.rand(site.in_features, generator=generator)
        options = {
            "r": r,
            "rank_pattern": ranks,
            "delora_lambda": 15,
            "lambda_pattern": {"q_proj": 3},
            "module_dropout": 0.0,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }
        return peft_file("DELORA", chosen, options), tensors


def _part(config: DeloraConfig, found: SiteTensors) -> LowRank:
    site = found.site
    a_RI = found.need("delora_A", ("r", site.in_features)).to(torch.float32)
    rank = a_RI.shape[0]
    check_rank(found, "delora_A", rank, config.r, config.rank_pattern)
    b_OR = found.need("delora_B", (site.out_features, rank)).to(torch.float32)
    strength = found.need("delora_lambda", (1,)).to(torch.float32)
    lengths_I = found.need("delora_w_norm", (site.in_features,)).to(torch.float32)
    scale_R = strength / rank / (_length(a_RI, 1) * _length(b_OR, 0))
    return LowRank(a_RI=a_RI * lengths_I, b_OR=b_OR * scale_R)


def _length(factor: Tensor, dim: int) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(factor, dim=dim)
    return length.clamp(min=SHORTEST)
