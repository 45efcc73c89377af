"""SVFit: ``y = W x + b + U_r diag(σ' − σ) V_r x``, where only the first r singular values are trained.

The file holds the new values σ'; U_r, σ and V_r are the first triplets of W's thin SVD. A joint change of
their signs changes nothing, so any machine's SVD will do.

Legend: T tokens, I in features, O out features, R trained values.

Paper: arXiv 2409.05926; no code of the authors' was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import shared_basis
from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import thin_svd
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

KEY = "svfit_sigma"
KEYS = frozenset({KEY})
LEFT, SIGMA, RIGHT = "left", "sigma", "right"


class SvfitConfig(PeftConfig):
    """Nothing of the config matters at inference."""


class Svfit(Method[SvfitConfig]):
    name = "svfit"
    paper = "arXiv 2409.05926"
    stored = "r singular values"
    regenerated = "the first r singular triplets, from the base"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SVFIT"

    def parse(self, raw_config: Mapping[str, Any]) -> SvfitConfig:
        return read_config(SvfitConfig, raw_config)

    def derive(self, config: SvfitConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            triplets = thin_svd(found.site.weight_OI).first(len(_values(found)))
            for key, tensor in zip((LEFT, SIGMA, RIGHT), triplets, strict=True):
                derived[derived_name(found.site.path, key)] = tensor.contiguous()
        return derived

    def compile(self, config: SvfitConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: SvfitConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            triplets = [tensors[derived_name(site.path, key)] for key in (LEFT, SIGMA, RIGHT)]
            left_OR, sigma_R, right_RI = (tensor.to(x_TI.dtype) for tensor in triplets)
            rest_OI = weight_OI - left_OR @ torch.diag(sigma_R) @ right_RI
            weight_OI = left_OR @ torch.diag(own[KEY].to(x_TI.dtype)) @ right_RI + rest_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": 4 + random_tensor((whole_number(1, 6, generator),), generator)
            for site in chosen
        }
        return peft_file("SVFIT", chosen, {}), tensors


def _values(found: SiteTensors) -> Tensor:
    values_R = found.need(KEY, ("r",))
    most = min(found.site.out_features, found.site.in_features)
    if len(values_R) > most:
        raise InvalidTensors(f"{found.name_of(KEY)}: found {len(values_R)} values, expected at most {most}")
    return values_R


def _part(found: SiteTensors) -> Projected:
    change_R = _values(found).to(torch.float32) - found.derived[SIGMA]
    basis = shared_basis(found.derived[RIGHT].unsqueeze(0), found.derived[LEFT].unsqueeze(0))
    return Projected(form="diagonal", core=change_R.unsqueeze(0), basis=basis)
