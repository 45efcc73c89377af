"""HRA, as PEFT saves it: an input that is reflected at r hyperplanes before the base's product.

``y = W H_0 H_1 … H_{r−1} x + b``, ``H_k = I − 2 u_k u_kᵀ`` with the columns of ``hra_u`` made unit vectors. A
chain of reflections is one change of rank r:

    H_0 … H_{r−1} = I − U C⁻¹ Uᵀ      C: UᵀU above its diagonal, 1/2 on it, 0 below

and with ``apply_GS``, where the columns are made orthonormal first, ``I − 2 Q Qᵀ`` is the same with
``C = UᵀU / 2``, from the projection on their span. So with ``−W U C⁻¹`` folded at load, HRA is low rank.

Legend: T tokens, I in features, O out features, R reflections.

Paper: arXiv 2405.17484; the chain as one matrix: Joffrain et al. 2006, the UT transform.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.base_products import right_product
from timbre_methods.config import PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY = "hra_u"
KEYS = frozenset({KEY})

LEAST_SPREAD = 1e-5
"""Unit columns whose smallest singular value is below this have no Gram-Schmidt form in float32."""


class HraConfig(PeftConfig):
    """How many reflections, and whether their vectors are made orthonormal. The defaults are PEFT's."""

    inert = frozenset({"init_weights"})

    r: Rank = 8
    apply_GS: bool = False


class Hra(Method[HraConfig]):
    name = "hra"
    paper = "arXiv 2405.17484"
    stored = "reflection vectors [in, r]"
    regenerated = "their products with the base's weight"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "HRA"

    def parse(self, raw_config: Mapping[str, Any]) -> HraConfig:
        return read_config(HraConfig, raw_config)

    def compile(self, config: HraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_factors(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: HraConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            u_IR = found.tensors[KEY].double()
            if not u_IR.norm(dim=0).all():
                raise InvalidTensors(f"{found.name_of(KEY)}: found a column of zeros, expected directions")
            if config.apply_GS and _spread(u_IR) < LEAST_SPREAD:
                raise InvalidTensors(
                    f"{found.name_of(KEY)}: found columns that depend on each other, "
                    "expected r independent ones, as apply_GS makes them orthonormal"
                )

    def reference(self, config: HraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = tensors_of_site(tensors, site, KEYS)
        turned_TI = x_TI
        if own:
            directions: list[Tensor] = []
            for u_I in own[KEY].to(x_TI.dtype).T:
                if config.apply_GS:
                    for earlier_I in directions:
                        u_I = u_I - (earlier_I * u_I).sum() * earlier_I
                directions.append(u_I / u_I.square().sum().sqrt())
            for u_I in reversed(directions):
                turned_TI = turned_TI - 2 * (turned_TI * u_I).sum(dim=1, keepdim=True) * u_I
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(turned_TI, site.weight_OI.to(x_TI.dtype), bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        rank = whole_number(2, 6, generator)
        options = {"apply_GS": coin(generator), "bias": "none", "init_weights": True, "r": rank}
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": random_tensor((site.in_features, rank), generator)
            for site in chosen
        }
        return peft_file("HRA", chosen, options), tensors


def _spread(u_IR: Tensor) -> float:
    """The smallest singular value of the columns made unit vectors; 0 where they are too many."""
    if u_IR.shape[1] > u_IR.shape[0]:
        return 0.0
    return float(torch.linalg.svdvals(u_IR / u_IR.norm(dim=0)).min())


def _factors(config: HraConfig, found: SiteTensors) -> LowRank:
    u_IR = found.need(KEY, (found.site.in_features, config.r)).to(torch.float64)
    unit_IR = u_IR / torch.linalg.vector_norm(u_IR, dim=0)
    gram_RR = unit_IR.T @ unit_IR
    eye_RR = torch.eye(config.r, dtype=gram_RR.dtype, device=gram_RR.device)
    core_RR = gram_RR / 2 if config.apply_GS else gram_RR.triu(1) + eye_RR / 2
    back_IR = torch.linalg.solve(core_RR, unit_IR, left=False).to(torch.float32)
    b_OR = right_product(found.site.weight_OI, -back_IR)
    return LowRank(a_RI=unit_IR.T.to(torch.float32), b_OR=b_OR)
