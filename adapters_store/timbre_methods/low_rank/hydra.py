"""Hydra: a parallel low-rank branch on a layer's input and a sequential one on its output.

    z = W x + b
    y = z + s (B_p (A_p x + a_p) + b_p) + s (B_s (A_s z + a_s) + b_s)

The sequential branch reads z with the base's bias. The four biases are there with ``branch_biases``. With
``A_s W`` folded at load, both branches are one low-rank change of the input and a constant.

Legend: T tokens, I in features, O out features, P ranks of the parallel branch, S of the sequential one.

Paper: arXiv 2309.06922.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.base_products import left_product
from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

BRANCHES = ("parallel", "sequential")
FACTORS = frozenset(f"hydra_{branch}_{factor}" for branch in BRANCHES for factor in "AB")
BIASES = frozenset(f"{factor}_bias" for factor in FACTORS)


class HydraConfig(PeftConfig):
    """The scale of both branches, and whether they have biases."""

    scale: Finite
    branch_biases: bool


class Hydra(Method[HydraConfig]):
    name = "hydra"
    paper = "arXiv 2309.06922"
    stored = "A_p [p, in], B_p [out, p], A_s [s, out], B_s [out, s]; four biases with branch_biases"
    regenerated = "A_s W, from the base"
    scales_bias = True
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "HYDRA"

    def parse(self, raw_config: Mapping[str, Any]) -> HydraConfig:
        return read_config(HydraConfig, raw_config)

    def compile(self, config: HydraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        keys = FACTORS | BIASES if config.branch_biases else FACTORS
        return AdapterProgram(
            {found.site.path: _parts(config, found) for found in tensors_by_site(tensors, sites, keys)}
        )

    def reference(self, config: HydraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        z_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        found = tensors_of_site(tensors, site, FACTORS | BIASES)
        own = {key: t.to(x_TI.dtype) for key, t in found.items()}
        y_TO = z_TO
        for branch, v in zip(BRANCHES, (x_TI, z_TO), strict=True) if own else ():
            for factor in "AB":
                key = f"hydra_{branch}_{factor}"
                v = torch.nn.functional.linear(v, own[key], own.get(f"{key}_bias"))
            y_TO = y_TO + config.scale * v
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        with_biases, tensors = coin(generator), {}
        for site in chosen:
            for branch, features in zip(BRANCHES, (site.in_features, site.out_features), strict=True):
                rank = whole_number(1, 4, generator)
                for factor, shape in (("A", (rank, features)), ("B", (site.out_features, rank))):
                    key = f"{PREFIX}{site.path}.hydra_{branch}_{factor}"
                    tensors[key] = random_tensor(shape, generator)
                    if with_biases:
                        tensors[f"{key}_bias"] = random_tensor(shape[:1], generator)
        options = {"branch_biases": with_biases, "scale": whole_number(1, 8, generator) / 4}
        return peft_file("HYDRA", chosen, options), tensors


def _parts(config: HydraConfig, found: SiteTensors) -> tuple[Part, ...]:
    site = found.site
    a_PI, b_OP = _factors(found, "parallel", site.in_features)
    a_SO, b_OS = _factors(found, "sequential", site.out_features)
    factors = LowRank(
        a_RI=torch.cat([a_PI, left_product(a_SO, site.weight_OI)]),
        b_OR=config.scale * torch.cat([b_OP, b_OS], dim=1),
    )
    if site.bias_O is None and not config.branch_biases:
        return (factors,)
    shift_O = a_SO.new_zeros(site.out_features)
    if site.bias_O is not None:
        shift_O = b_OS @ (a_SO @ site.bias_O.to(a_SO.device, torch.float32))
    if config.branch_biases:
        for branch, b_OR in (("parallel", b_OP), ("sequential", b_OS)):
            inner_R = found.need(f"hydra_{branch}_A_bias", (b_OR.shape[1],)).to(torch.float32)
            outer_O = found.need(f"hydra_{branch}_B_bias", (site.out_features,)).to(torch.float32)
            shift_O = shift_O + b_OR @ inner_R + outer_O
    return factors, Diagonal("output", gain=torch.ones_like(shift_O), shift=config.scale * shift_O)


def _factors(found: SiteTensors, branch: str, features: int) -> tuple[Tensor, Tensor]:
    a_RF = found.need(f"hydra_{branch}_A", ("r", features))
    b_OR = found.need(f"hydra_{branch}_B", (found.site.out_features, a_RF.shape[0]))
    return a_RF.to(torch.float32), b_OR.to(torch.float32)
