"""LN tuning, as PEFT saves it: norms with weights (and biases) of their own, ``y = w_k ∘ x + b_k``.

Whatever layer the file names is replaced by the file's values; by default these are the norms.

Legend: T tokens, I in features, O out features.

Paper: arXiv 2312.11420.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, Part
from timbre_methods.replaced import replacement, stored_shape
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

STEM = "ln_tuning_layers."
WEIGHT, BIAS = f"{STEM}weight", f"{STEM}bias"
KEYS = frozenset({WEIGHT, BIAS})


class LnTuningConfig(PeftConfig):
    """Nothing of the config matters at inference."""


class LnTuning(Method[LnTuningConfig]):
    name = "ln_tuning"
    paper = "arXiv 2312.11420"
    stored = "weight [d] of a norm; bias [d] where the base has one"
    checked_against = "PEFT"
    scales_bias = True
    kinds = frozenset({"linear", "embedding", "norm"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LN_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> LnTuningConfig:
        return read_config(LnTuningConfig, raw_config)

    def compile(self, config: LnTuningConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: _parts(found) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: LnTuningConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = tensors_of_site(tensors, site, KEYS)
        weight = site.weight_OI
        if WEIGHT in own:
            weight = own[WEIGHT].T if site.is_transposed else own[WEIGHT]
        bias_O = own.get(BIAS, site.bias_O)
        if site.kind == "norm":
            y_TO = x_TI * weight.to(x_TI.dtype)
        else:
            y_TO = torch.einsum("oi,ti->to", weight.to(x_TI.dtype), x_TI)
        return y_TO if bias_O is None else y_TO + bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {}
        for site in chosen:
            tensors[f"{PREFIX}{site.path}.{WEIGHT}"] = random_tensor(stored_shape(site), generator)
            if site.bias_O is not None:
                tensors[f"{PREFIX}{site.path}.{BIAS}"] = random_tensor((site.out_features,), generator)
        return peft_file("LN_TUNING", chosen, {"exclude_modules": None, "modules_to_save": None}), tensors


def _parts(found: SiteTensors) -> tuple[Part, ...]:
    for key in (WEIGHT, BIAS) if found.site.bias_O is not None else (WEIGHT,):
        if key not in found.tensors:
            raise InvalidTensors(f"{found.name_of(key)} is missing: the whole layer is replaced")
    return replacement(found, STEM)
