"""Propulsion: each output of a layer is scaled by a power, ``y = p^d ∘ (W x + b)``.

The power is taken once, in float64: of a half-precision p, with the usual degree of 15, it would be far off.

Legend: T tokens, I in features, O out features.

Paper: arXiv 2409.10927.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY = "propulsion"
KEYS = frozenset({KEY})


class PropulsionConfig(PeftConfig):
    """The degree, which the authors' code keeps as an attribute and leaves out of its checkpoints."""

    degree: Annotated[int, Field(ge=1, le=1000)]


class Propulsion(Method[PropulsionConfig]):
    name = "propulsion"
    paper = "arXiv 2409.10927"
    stored = "p [out]"
    scales_bias = True
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PROPULSION"

    def parse(self, raw_config: Mapping[str, Any]) -> PropulsionConfig:
        return read_config(PropulsionConfig, raw_config)

    def compile(self, config: PropulsionConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: (Diagonal(side="output", gain=_gain(config, found)),)
                for found in tensors_by_site(tensors, sites, KEYS)
            }
        )

    def check_values(self, config: PropulsionConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            if not _gain(config, found).isfinite().all():
                raise InvalidTensors(
                    f"{found.name_of(KEY)}: found a value whose power of {config.degree} is infinite"
                )

    def reference(self, config: PropulsionConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = tensors_of_site(tensors, site, KEYS)
        for _ in range(config.degree if own else 0):
            y_TO = y_TO * own[KEY].to(x_TI.dtype)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": 1 + 0.1 * random_tensor((site.out_features,), generator)
            for site in chosen
        }
        return peft_file("PROPULSION", chosen, {"degree": whole_number(1, 15, generator)}), tensors


def _gain(config: PropulsionConfig, found: SiteTensors) -> Tensor:
    p_O = found.need(KEY, (found.site.out_features,)).to(torch.float64)
    return p_O.pow(config.degree).to(torch.float32)
