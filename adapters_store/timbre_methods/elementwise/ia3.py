"""(IA)3, as PEFT saves it: a learned gain on a layer's input or on its output.

A tensor [1, I] is a gain on the input, ``y = W (l * x) + b``; a tensor [O, 1] is one on the output,
``y = l * (W x + b)``, which scales the base's bias too. The shape alone tells which.

Legend: T tokens, I in features, O out features.

Paper: arXiv 2205.05638 section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, Diagonal
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY = "ia3_l"
KEYS = frozenset({KEY})


class Ia3Config(PeftConfig):
    """Nothing of the config matters at inference: the shapes tell which layers scale their input."""

    inert = frozenset({"feedforward_modules", "init_ia3_weights"})


class Ia3(Method[Ia3Config]):
    name = "ia3"
    paper = "arXiv 2205.05638"
    stored = "gain [in] or [out]"
    scales_bias = True
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "IA3"

    def parse(self, raw_config: Mapping[str, Any]) -> Ia3Config:
        return read_config(Ia3Config, raw_config)

    def compile(self, config: Ia3Config, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_gain(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: Ia3Config, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        bias_O = torch.zeros(site.out_features) if site.bias_O is None else site.bias_O
        bias_O = bias_O.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            gain = own[KEY].to(x_TI.dtype)
            weight_OI = weight_OI * gain  # [1, I] scales columns, [O, 1] scales rows
            if gain.shape[0] != 1:
                bias_O = bias_O * gain[:, 0]
        return torch.einsum("oi,ti->to", weight_OI, x_TI) + bias_O

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors, on_input = {}, []
        for number, site in enumerate(chosen):
            shape = (site.out_features, 1)
            if coin(generator) or number == 0:
                shape = (1, site.in_features)
                on_input.append(site.path)
            tensors[f"{PREFIX}{site.path}.{KEY}"] = 1 + random_tensor(shape, generator)
        options = {
            "feedforward_modules": on_input,
            "init_ia3_weights": True,
            "modules_to_save": None,
        }
        return peft_file("IA3", chosen, options), tensors


def _gain(found: SiteTensors) -> Diagonal:
    found_shape = found.tensors[KEY].shape
    on_input, on_output = (1, found.site.in_features), (found.site.out_features, 1)
    if found_shape not in (on_input, on_output):
        raise InvalidTensors(
            f"{found.name_of(KEY)}: found shape {list(found_shape)}, "
            f"expected {list(on_input)} (input) or {list(on_output)} (output)"
        )
    gain = found.need(KEY, tuple(found_shape)).to(torch.float32, copy=True).flatten()
    return Diagonal(side="input" if found_shape == on_input else "output", gain=gain)
