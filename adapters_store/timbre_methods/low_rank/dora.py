"""DoRA, as PEFT saves it: LoRA whose adapted rows are given learned lengths.

``V = W + s B A``, ``g = m / |V|`` for each output row, ``y = g * (V x) + b``: the base's bias is not scaled.
``m`` is in the file. ``g`` does not depend on the input, so it is computed once, from the base's weight.

Legend: T tokens, I in features, O out features, R rank, C rows in one piece.

Paper: arXiv 2402.09353 equation 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import is_on
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import UnsupportedMethod
from timbre_methods.low_rank.lora import (
    EMBEDDING_FACTORS,
    FACTORS,
    VARIANTS,
    LoraConfig,
    factor_keys,
    lora_example,
    read_factors,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.site_tensors import SiteTensors, tensors_by_site, tensors_of_site

MAGNITUDE = "lora_magnitude_vector"
KEYS = frozenset({*FACTORS, *EMBEDDING_FACTORS, MAGNITUDE})

ROWS_AT_ONCE = 1024
CELLS_AT_ONCE = 2**25
"""Rows and values of W that are widened together, so that a large head or embedding needs little memory
beside it. A row of an embedding is one of its dimensions, over the whole vocabulary."""


class DoraConfig(LoraConfig):
    """LoRA's fields, with the switch that makes DoRA of it."""

    use_dora: bool


class Dora(Method[DoraConfig]):
    name = "dora"
    paper = "arXiv 2402.09353"
    stored = "A [r, in], B [out, r], magnitude [out]"
    regenerated = "the lengths of the adapted rows, from the base"
    checked_against = "PEFT"
    may_be_stacked = True
    kinds = frozenset({"linear", "embedding"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        switches = {switch for switch in VARIANTS if is_on(raw_config.get(switch))}
        return raw_config.get("peft_type") == "LORA" and switches == {"use_dora"}

    def parse(self, raw_config: Mapping[str, Any]) -> DoraConfig:
        config = read_lora_config(DoraConfig, raw_config)
        if config.lora_bias:
            raise UnsupportedMethod(
                "LORA with use_dora: the option 'lora_bias' is on and is not served: "
                "the formula of DoRA has no bias in B; train with lora_bias=false"
            )
        return config

    def compile(self, config: DoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        return AdapterProgram(
            {
                found.site.path: _parts(config, alphas, found)
                for found in tensors_by_site(tensors, sites, KEYS)
            }
        )

    def reference(self, config: DoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            a_RI, b_OR = (own[key] for key in factor_keys(site))
            s = reference_scale(config, site, a_RI.shape[0])
            direction_OI = weight_OI + s * torch.einsum("or,ri->oi", b_OR, a_RI)
            length_O = direction_OI.square().sum(dim=1).sqrt()
            weight_OI = torch.diag(own[MAGNITUDE] / length_O) @ direction_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raw_config, tensors = lora_example(sites, generator, with_bias=False)
        raw_config["use_dora"] = True
        for name, tensor in list(tensors.items()):
            for key in (FACTORS[1], EMBEDDING_FACTORS[1]):
                if name.endswith(key):
                    lengths_O = 0.5 + 4 * torch.rand(tensor.shape[0], generator=generator)
                    tensors[name.removesuffix(key) + MAGNITUDE] = lengths_O
        return raw_config, tensors


def _parts(config: DoraConfig, alphas: PathPatterns, found: SiteTensors) -> tuple[Part, ...]:
    site = found.site
    a_RI, b_OR = (factor.to(torch.float32, copy=True) for factor in read_factors(config, found))
    magnitude_O = found.need(MAGNITUDE, (site.out_features,)).to(torch.float32)
    b_OR *= scale(config, alphas, site.path, a_RI.shape[0])
    length_O = _row_lengths(site.weight_OI, a_RI, b_OR)
    # A row of zeros stays one, whatever its length is called; dividing by it would make it NaN.
    gain_O = torch.where(length_O > 0, magnitude_O / length_O, 1.0)
    shift_O = None
    if site.bias_O is not None:
        shift_O = (1 - gain_O) * site.bias_O.to(a_RI.device, torch.float32)
    scaled = LowRank(a_RI=a_RI, b_OR=gain_O[:, None] * b_OR)
    return scaled, Diagonal(side="output", gain=gain_O, shift=shift_O)


def _row_lengths(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """``|W + B A|`` of each row, in float32."""
    pieces = []
    step = max(1, min(ROWS_AT_ONCE, CELLS_AT_ONCE // weight_OI.shape[1]))
    for start in range(0, weight_OI.shape[0], step):
        rows = slice(start, start + step)
        w_CI = weight_OI[rows].to(a_RI.device, torch.float32)
        pieces.append(torch.linalg.vector_norm(w_CI + b_OR[rows] @ a_RI, dim=1))
    return torch.cat(pieces)
