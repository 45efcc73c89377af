"""RoAd, as PEFT saves it: a 2 x 2 matrix for each pair of output entries, after the bias.

In each group of ``group_size`` entries, entry i of the first half is paired with entry i of the second:

    y_1 = p_1 y0_1 − q_1 y0_2       p = α cos θ
    y_2 = q_2 y0_1 + p_2 y0_2       q = α sin θ

``road_1`` has one θ and α for a pair, ``road_2`` one for each entry, ``road_4`` one for p and one for q of
each entry, those of p first in each group.

Legend: T tokens, I in features, O out features, P stored parameters, N groups, H half of a group's size.

Paper: arXiv 2409.00119 equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Rotation
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

THETA = "road_theta"
ALPHA = "road_alpha"
KEYS = frozenset({THETA, ALPHA})

STORED = {"road_1": Fraction(1, 2), "road_2": Fraction(1), "road_4": Fraction(2)}
"""Angles in the file for each output entry."""


class RoadConfig(PeftConfig):
    """Which parameters a pair shares, and how far apart its entries are."""

    inert = frozenset({"init_weights"})

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"
    group_size: Count = 64


class Road(Method[RoadConfig]):
    name = "road"
    paper = "arXiv 2409.00119"
    stored = "angles and lengths, each [out / 2], [out] or [2 out]"
    scales_bias = True
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ROAD"

    def parse(self, raw_config: Mapping[str, Any]) -> RoadConfig:
        config = read_config(RoadConfig, raw_config)
        if config.group_size % 2:
            raise InvalidConfig(f"ROAD: found group_size {config.group_size}, expected an even number")
        return config

    def compile(self, config: RoadConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_rotation(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: RoadConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y0_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y0_TO
        y_TO, half = torch.empty_like(y0_TO), config.group_size // 2
        for place in range(site.out_features):
            group, within = divmod(place, config.group_size)
            for_p, for_q = {
                "road_1": (group * half + within % half,) * 2,
                "road_2": (place, place),
                "road_4": (place + group * 2 * half, place + (group + 1) * 2 * half),
            }[config.variant]
            p = own[ALPHA][for_p] * torch.cos(own[THETA][for_p])
            q = own[ALPHA][for_q] * torch.sin(own[THETA][for_q])
            partner = -y0_TO[:, place + half] if within < half else y0_TO[:, place - half]
            y_TO[:, place] = p * y0_TO[:, place] + q * partner
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        even = {path: site for path, site in sites.items() if site.out_features % 2 == 0}
        chosen = chosen_sites(even, generator)
        group_size = (2, 4, 6)[whole_number(0, 2, generator)]
        chosen = [site for site in chosen if site.out_features % group_size == 0] or chosen[:1]
        if chosen[0].out_features % group_size:
            group_size = chosen[0].out_features
        variant = sorted(STORED)[whole_number(0, 2, generator)]
        tensors = {}
        for site in chosen:
            shape = (int(site.out_features * STORED[variant]),)
            tensors[f"{PREFIX}{site.path}.{THETA}"] = 2 * random_tensor(shape, generator)
            tensors[f"{PREFIX}{site.path}.{ALPHA}"] = 1 + random_tensor(shape, generator)
        options = {"group_size": group_size, "init_weights": True, "variant": variant}
        return peft_file("ROAD", chosen, options), tensors


def _rotation(config: RoadConfig, found: SiteTensors) -> Rotation:
    out_features, half = found.site.out_features, config.group_size // 2
    if out_features % config.group_size:
        raise InvalidTensors(
            f"{found.site.path}: found {out_features} outputs, "
            f"expected a multiple of the config's group_size {config.group_size}"
        )
    shape = (int(out_features * STORED[config.variant]),)
    theta_P, alpha_P = (found.need(key, shape).to(torch.float32) for key in (THETA, ALPHA))
    p_P, q_P = alpha_P * theta_P.cos(), alpha_P * theta_P.sin()
    if config.variant == "road_1":
        p_1NH = p_2NH = p_P.view(-1, half)
        q_1NH = q_2NH = q_P.view(-1, half)
    elif config.variant == "road_2":
        p_1NH, p_2NH = p_P.view(-1, 2, half).unbind(1)
        q_1NH, q_2NH = q_P.view(-1, 2, half).unbind(1)
    else:
        p_1NH, p_2NH = p_P.view(-1, 4, half)[:, :2].unbind(1)
        q_1NH, q_2NH = q_P.view(-1, 4, half)[:, 2:].unbind(1)
    blocks_NH22 = torch.stack([p_1NH, -q_1NH, q_2NH, p_2NH], dim=-1)
    return Rotation("output", blocks_NH22.view(1, -1, 2, 2), (config.group_size,))
