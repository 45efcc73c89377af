"""SSF: each output of a layer is scaled and shifted, ``y = γ ∘ (W x + b) + β``.

Only linear layers are served; the paper has scales after norms too.

Legend: T tokens, I in features, O out features.

Paper: arXiv 2210.08823.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, Diagonal
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

SCALE = "ssf_scale"
SHIFT = "ssf_shift"
KEYS = frozenset({SCALE, SHIFT})


class SsfConfig(PeftConfig):
    """Nothing but the tensors matters."""


class Ssf(Method[SsfConfig]):
    name = "ssf"
    paper = "arXiv 2210.08823"
    stored = "scale [out], shift [out]"
    scales_bias = True
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SSF"

    def parse(self, raw_config: Mapping[str, Any]) -> SsfConfig:
        return read_config(SsfConfig, raw_config)

    def compile(self, config: SsfConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_gain(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: SsfConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        bias_O = x_TI.new_zeros(site.out_features) if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            weight_OI = torch.diag(own[SCALE]) @ weight_OI
            bias_O = bias_O * own[SCALE] + own[SHIFT]
        return torch.einsum("oi,ti->to", weight_OI, x_TI) + bias_O

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {}
        for site in chosen:
            shape = (site.out_features,)
            tensors[f"{PREFIX}{site.path}.{SCALE}"] = 1 + random_tensor(shape, generator)
            tensors[f"{PREFIX}{site.path}.{SHIFT}"] = random_tensor(shape, generator)
        return peft_file("SSF", chosen, {}), tensors


def _gain(found: SiteTensors) -> Diagonal:
    scale_O, shift_O = (
        found.need(key, (found.site.out_features,)).to(torch.float32, copy=True) for key in (SCALE, SHIFT)
    )
    return Diagonal(side="output", gain=scale_O, shift=shift_O)
