"""PEANuT, as PEFT saves it: ``y = W x + b + s B G x``, where a small network makes ``G`` of W itself.

Column by column of W: ``h = f(A w)``, then ``depth`` encoders ``h = f(E_i h)``, then as many decoders
``h = f(D_i h)``, each with the input of its encoder added, the last encoder's first. The network sees the
weights and never x, so it runs once, when the adapter is loaded; what is left is a LoRA.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2410.01870.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.base_products import left_product
from timbre_methods.config import Finite, PeftConfig, Rank, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import UnsupportedMethod
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.activations import ACTIVATIONS
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B = "peanut_A.weight", "peanut_B.weight"


class PeanutConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights"})

    r: Rank = 32
    depth: Annotated[int, Field(ge=0, le=64)] = 0
    act_fn: Annotated[str, Field(max_length=64)] = "relu"
    scaling: Finite = 1.0

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(f"peanut_encoders.{number}.weight" for number in range(self.depth))

    @property
    def decoders(self) -> tuple[str, ...]:
        return tuple(f"peanut_decoders.{number}.weight" for number in range(self.depth))

    @property
    def keys(self) -> frozenset[str]:
        return frozenset({A, B, *self.encoders, *self.decoders})


class Peanut(Method[PeanutConfig]):
    name = "peanut"
    paper = "arXiv 2410.01870"
    stored = "A [r, out], B [out, r], 2 depth matrices [r, r]"
    regenerated = "the input's factor, by the network, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PEANUT"

    def parse(self, raw_config: Mapping[str, Any]) -> PeanutConfig:
        config = read_config(PeanutConfig, raw_config)
        if config.act_fn not in ACTIVATIONS:
            raise UnsupportedMethod(
                f"PEANUT: act_fn={shown(config.act_fn)} is not served; there are {', '.join(ACTIVATIONS)}"
            )
        return config

    def compile(self, config: PeanutConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: (_part(config, found),)
                for found in tensors_by_site(tensors, sites, config.keys)
            }
        )

    def reference(self, config: PeanutConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, config.keys).items()}
        if own:
            f = ACTIVATIONS[config.act_fn]
            columns = []
            for w_O in weight_OI.T:
                h_R, inputs = f(torch.mv(own[A], w_O)), []
                for key in config.encoders:
                    inputs.append(h_R)
                    h_R = f(torch.mv(own[key], h_R))
                for key in config.decoders:
                    h_R = f(torch.mv(own[key], h_R)) + inputs.pop()
                columns.append(torch.mv(own[B], h_R))
            weight_OI = weight_OI + config.scaling * torch.stack(columns, dim=1)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, depth = whole_number(1, 3, generator), whole_number(0, 2, generator)
        smooth = ("gelu", "linear", "mish", "silu", "sqrtsoftplus", "tanh")
        tensors = {}
        for site in chosen:
            stem = PREFIX + site.path
            tensors[f"{stem}.{A}"] = random_tensor((r, site.out_features), generator) / 2
            tensors[f"{stem}.{B}"] = random_tensor((site.out_features, r), generator)
            for number in range(depth):
                for half in ("encoders", "decoders"):
                    key = f"peanut_{half}.{number}.weight"
                    tensors[f"{stem}.{key}"] = random_tensor((r, r), generator) + torch.eye(r)
        options = {
            "r": r,
            "depth": depth,
            "act_fn": smooth[whole_number(0, len(smooth) - 1, generator)],
            "scaling": 0.75,
            "init_weights": True,
            "modules_to_save": None,
        }
        return peft_file("PEANUT", chosen, options), tensors


def _part(config: PeanutConfig, found: SiteTensors) -> LowRank:
    site, r, f = found.site, config.r, ACTIVATIONS[config.act_fn]
    a_RO = found.need(A, (r, site.out_features)).to(torch.float32)
    b_OR = found.need(B, (site.out_features, r)).to(torch.float32)
    encoders, decoders = (
        [found.need(key, (r, r)).to(torch.float32) for key in keys]
        for keys in (config.encoders, config.decoders)
    )
    h_RI = f(left_product(a_RO, site.weight_OI))
    inputs = []
    for e_RR in encoders:
        inputs.append(h_RI)
        h_RI = f(e_RR @ h_RI)
    for d_RR in decoders:
        h_RI = f(d_RR @ h_RI) + inputs.pop()
    return LowRank(a_RI=h_RI, b_OR=b_OR * config.scaling)
