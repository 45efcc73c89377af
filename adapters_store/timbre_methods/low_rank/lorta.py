"""LoRTA: all layers of an adapter are slices of one tensor of low rank, ``y = W x + b + s A (c ∘ z)``.

``z = Σ_h C_h[h] ∘ (B x_h)``, where x is cut in H pieces, one for each head: ``z = P x`` with
``P = [diag(C_h[0]) B | diag(C_h[1]) B | …]``. A [O, R], B [R, I / H] and C_h [H, R] belong to the whole
adapter, c [R] to a layer: the product of its layer's and its matrix's rows. ``s = alpha / r``. A is on the
side of the output, and the heads on that of the input, for all matrices. So layers differ by R numbers alone,
and P and A are kept once for all of them.

Legend: T tokens, I in features, O out features, R rank, H heads, D in features of a head.

Paper: arXiv 2410.04060 section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import shared_basis
from timbre_methods.config import Count, Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Basis, Projected
from timbre_methods.site_tensors import PREFIX, SiteTensors, check_tensor, tensors_by_site, tensors_of_site

A, B, HEADS = "base_model.lorta_A", "base_model.lorta_B", "base_model.lorta_C_h"
WHOLE = (A, B, HEADS)
KEY = "lorta_c"
KEYS = frozenset({KEY})


class LortaConfig(PeftConfig):
    r: Rank
    lora_alpha: Finite
    num_heads: Count


class Lorta(Method[LortaConfig]):
    name = "lorta"
    paper = "arXiv 2410.04060"
    stored = "A [out, r], B [r, in / heads], C_h [heads, r] once; c [r]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LORTA"

    def parse(self, raw_config: Mapping[str, Any]) -> LortaConfig:
        return read_config(LortaConfig, raw_config)

    def compile(self, config: LortaConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        adapted = list(tensors_by_site(tensors, sites, KEYS, beside=WHOLE))
        basis = _basis(config, tensors, adapted)
        scale = config.lora_alpha / config.r
        return AdapterProgram(
            {
                found.site.path: (
                    Projected(
                        "diagonal", found.need(KEY, (config.r,)).to(torch.float32)[None] * scale, basis
                    ),
                )
                for found in adapted
            }
        )

    def reference(self, config: LortaConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            a_OR, b_RD, heads_HR = (tensors[name].to(x_TI.dtype) for name in WHOLE)
            delta_OHD = torch.einsum("or,r,hr,rd->ohd", a_OR, own[KEY].to(x_TI.dtype), heads_HR, b_RD)
            weight_OI = weight_OI + config.lora_alpha / config.r * delta_OHD.flatten(1)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = whole_number(1, 5, generator)
        # All sites of one shape, as the attention's matrices are.
        shapes = list(dict.fromkeys(tuple(site.weight_OI.shape) for site in sites.values()))
        out_features, in_features = shapes[whole_number(0, len(shapes) - 1, generator)]
        heads = in_features if in_features % 3 else 3
        tensors = {
            A: random_tensor((out_features, rank), generator),
            B: random_tensor((rank, in_features // heads), generator),
            HEADS: random_tensor((heads, rank), generator),
        }
        for site in sites.values():
            if site.weight_OI.shape == (out_features, in_features):
                tensors[f"{PREFIX}{site.path}.{KEY}"] = random_tensor((rank,), generator)
        config = {
            "peft_type": "LORTA",
            "r": rank,
            "lora_alpha": whole_number(2, 9, generator),
            "num_heads": heads,
        }
        return config, tensors


def _basis(config: LortaConfig, tensors: Tensors, adapted: list[SiteTensors]) -> Basis:
    """P and A, which fit every adapted layer."""
    first = adapted[0].site
    other = next((f.site for f in adapted if f.site.weight_OI.shape != first.weight_OI.shape), None)
    if other is not None:
        raise InvalidTensors(
            f"{other.path}: found a layer of {list(other.weight_OI.shape)}, expected all of one shape, "
            f"{list(first.weight_OI.shape)} as {first.path}; leave the others out"
        )
    if first.in_features % config.num_heads:
        raise InvalidTensors(
            f"{first.path}: found {first.in_features} in features, "
            f"expected a multiple of {config.num_heads} heads"
        )
    shapes = (
        (first.out_features, config.r),
        (config.r, first.in_features // config.num_heads),
        (config.num_heads, config.r),
    )
    for name, shape in zip(WHOLE, shapes, strict=True):
        if name not in tensors:
            raise InvalidTensors(f"{name} is missing")
        check_tensor(name, tensors[name], shape)
    a_OR, b_RD, heads_HR = (tensors[name].to(torch.float32) for name in WHOLE)
    p_RHD = heads_HR.T[:, :, None] * b_RD[:, None, :]
    return shared_basis(p_RHD.flatten(1)[None], a_OR[None])
