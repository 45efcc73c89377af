"""BEFT, as PEFT saves it: a vector that is added to a layer's output, ``y = W x + b + β``.

Legend: T tokens, I in features, O out features.

Paper: arXiv 2509.15974.
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

KEY = "beft_bias"
KEYS = frozenset({KEY})


class BeftConfig(PeftConfig):
    """Nothing of the config matters at inference."""

    inert = frozenset({"init_weights"})


class Beft(Method[BeftConfig]):
    name = "beft"
    paper = "arXiv 2509.15974"
    stored = "shift [1, out]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "BEFT"

    def parse(self, raw_config: Mapping[str, Any]) -> BeftConfig:
        return read_config(BeftConfig, raw_config)

    def compile(self, config: BeftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_shift(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: BeftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = torch.zeros(site.out_features) if site.bias_O is None else site.bias_O
        own = tensors_of_site(tensors, site, KEYS)
        bias_O = bias_O.to(x_TI.dtype) + own.get(KEY, torch.zeros(1)).to(x_TI.dtype).flatten()
        return torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": random_tensor((1, site.out_features), generator) for site in chosen
        }
        return peft_file("BEFT", chosen, {"init_weights": True, "modules_to_save": None}), tensors


def _shift(found: SiteTensors) -> Diagonal:
    shift_O = found.need(KEY, (1, found.site.out_features)).to(torch.float32, copy=True).flatten()
    return Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O)
