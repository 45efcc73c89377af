"""SNELLA: SNELL with a richer kernel and a threshold for each layer: ``y = W x + b + D x``.

    K' = K + α softmax_o(K / γ) + β      K as SNELL has it, each input's softmax over the outputs
    D  = K' |K'| where |K'| is above the layer's quantile of all |K'|, else 0

α, γ and β are numbers of a layer. The layers compete for the entries that survive, so each has a threshold
of its own, which the released code keeps beside its parameters. At a threshold of 0 all survive but the
smallest, and are still multiplied by their own magnitude, unlike SNELL's.

Legend: T tokens, I in features, O out features, D dimensions of the points, 2 signs.

Paper: arXiv 2510.24037; its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense, Sparse
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.snell import IN_POINTS, OUT_POINTS, Threshold, kernel_of, sparsified

ALPHA, GAMMA, BETA = "snella_alpha", "snella_gamma", "snella_beta"
KEYS = frozenset({IN_POINTS, OUT_POINTS, ALPHA, GAMMA, BETA})


class SnellaConfig(PeftConfig):
    """``init_thres`` of each layer, by its path."""

    thresholds: Annotated[dict[str, Threshold], Field(max_length=4096)]


class Snella(Method[SnellaConfig]):
    name = "snella"
    paper = "arXiv 2510.24037"
    stored = "points [2, in, q / 2] and [2, out, q / 2], α, γ and β [1]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SNELLA"

    def parse(self, raw_config: Mapping[str, Any]) -> SnellaConfig:
        return read_config(SnellaConfig, raw_config)

    def compile(self, config: SnellaConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts: dict[str, tuple[Dense | Sparse]] = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            path = found.site.path
            if path not in config.thresholds:
                raise InvalidConfig(f"adapter_config.json: thresholds: found none of {path!r}, expected one")
            parts[path] = (sparsified(found, _kernel(found), config.thresholds[path]),)
        return AdapterProgram(parts)

    def check_values(self, config: SnellaConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            if float(found.tensors[GAMMA]) == 0:
                raise InvalidTensors(f"{found.name_of(GAMMA)}: found 0, by which nothing can be divided")

    def reference(self, config: SnellaConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        delta_OI = torch.zeros(site.out_features, site.in_features, dtype=x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            apart_2OID = own[OUT_POINTS].unsqueeze(2) - own[IN_POINTS].unsqueeze(1)
            plus_OI, minus_OI = apart_2OID.square().sum(-1).sqrt()
            kernel_OI = 0.1 * plus_OI - 0.1 * minus_OI
            exponents_OI = kernel_OI / own[GAMMA]
            shares_OI = (exponents_OI - exponents_OI.logsumexp(0)).exp()
            kernel_OI = kernel_OI + own[ALPHA] * shares_OI + own[BETA]
            magnitude_OI = kernel_OI.abs()
            edge = torch.quantile(magnitude_OI.flatten(), config.thresholds[site.path])
            delta_OI = kernel_OI * torch.where(magnitude_OI > edge, magnitude_OI, 0.0)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype) + delta_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors, thresholds = chosen_sites(sites, generator), {}, {}
        for site in chosen:
            dimensions, stem = whole_number(1, 4, generator), PREFIX + site.path
            tensors[f"{stem}.{IN_POINTS}"] = 8 * random_tensor((2, site.in_features, dimensions), generator)
            tensors[f"{stem}.{OUT_POINTS}"] = 8 * random_tensor((2, site.out_features, dimensions), generator)
            for key in (ALPHA, GAMMA, BETA):
                tensors[f"{stem}.{key}"] = 0.5 + torch.rand(1, generator=generator)
            thresholds[site.path] = (0.0, 0.5, 0.95)[whole_number(0, 2, generator)]
        return peft_file("SNELLA", chosen, {"thresholds": thresholds}), tensors


def _kernel(found: SiteTensors) -> Tensor:
    """K' in float32."""
    kernel_OI = kernel_of(found)
    alpha, gamma, beta = (found.need(key, (1,)).to(torch.float32) for key in (ALPHA, GAMMA, BETA))
    return kernel_OI + alpha * torch.softmax(kernel_OI / gamma, dim=0) + beta
