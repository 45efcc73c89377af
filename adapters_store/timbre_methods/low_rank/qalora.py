"""QA-LoRA, as PEFT saves it: a LoRA that sees the input as means of groups: ``y = W x + b + s B A (G m)``.

``m_n`` is the mean of the n-th of G groups of ``qalora_group_size`` inputs, g; PEFT multiplies the means by
their number. So it is a LoRA whose A repeats each column over a group, times G / g. PEFT has it on GPTQ bases
alone and ignores the option on other layers: there A is as wide as the input, and the file a plain LoRA. Like
any adapter of a quantised base, it is exact on the weights that it was trained on: serve these, dequantised.

Legend: T tokens, I in features, O out features, R rank, G groups.

Paper: arXiv 2309.14717.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import is_on
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.examples import coin
from timbre_methods.low_rank.lora import (
    FACTORS,
    VARIANTS,
    LoraConfig,
    lora_example,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import SiteTensors, tensors_by_site, tensors_of_site

SWITCH = "use_qalora"
KEYS = frozenset(FACTORS)


class QaloraConfig(LoraConfig):
    """LoRA's fields, with the switch and the size of a group."""

    inert = LoraConfig.inert - {"qalora_group_size"}

    use_qalora: bool
    qalora_group_size: Annotated[int, Field(ge=1, le=2**31 - 1)] = 16


class Qalora(Method[QaloraConfig]):
    name = "qalora"
    paper = "arXiv 2309.14717"
    stored = "A [r, in / group], B [out, r]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        switches = {switch for switch in VARIANTS if is_on(raw_config.get(switch))}
        return raw_config.get("peft_type") == "LORA" and switches == {SWITCH}

    def parse(self, raw_config: Mapping[str, Any]) -> QaloraConfig:
        config = read_lora_config(QaloraConfig, raw_config)
        if config.lora_bias:
            raise UnsupportedMethod(
                "LORA with use_qalora: the option 'lora_bias' is on and is not served: PEFT's QA-LoRA leaves "
                "the bias of B out; train with lora_bias=false"
            )
        if config.qalora_group_size == 1:
            raise UnsupportedMethod(
                "LORA with use_qalora: qalora_group_size=1 is not served: such a file looks like that of a "
                "layer where PEFT ignores the option, and means another thing; train a plain LoRA"
            )
        return config

    def compile(self, config: QaloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        parts = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            a_RI, b_OR = _factors(config, found)
            s = scale(config, alphas, found.site.path, a_RI.shape[0])
            parts[found.site.path] = (LowRank(a_RI, b_OR * s),)
        return AdapterProgram(parts)

    def reference(self, config: QaloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            a_RG, b_OR = (own[key] for key in FACTORS)
            groups = a_RG.shape[1]
            if groups != site.in_features:
                x_TI = x_TI.view(len(x_TI), groups, -1).mean(dim=2) * groups
            y_TO = y_TO + reference_scale(config, site, len(a_RG)) * (x_TI @ a_RG.T @ b_OR.T)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        even = {path: site for path, site in sites.items() if site.in_features % 2 == 0}
        raw_config, tensors = lora_example(even, generator, with_bias=False)
        for name, tensor in tensors.items():
            if name.endswith(FACTORS[0]) and coin(generator):
                tensors[name] = tensor[:, ::2].contiguous()
        return {**raw_config, SWITCH: True, "qalora_group_size": 2}, tensors


def _factors(config: QaloraConfig, found: SiteTensors) -> tuple[Tensor, Tensor]:
    """A [R, I] on the whole input and B [O, R], in float32."""
    key_a, key_b = FACTORS
    in_features, size = found.site.in_features, config.qalora_group_size
    a_RG = found.need(key_a, ("r", "groups")).to(torch.float32, copy=True)
    rank, groups = a_RG.shape
    b_OR = found.need(key_b, (found.site.out_features, rank)).to(torch.float32)
    check_rank(found, key_a, rank, config.r, config.rank_pattern)
    if groups == in_features:
        return a_RG, b_OR
    if groups * size != in_features:
        raise InvalidTensors(
            f"{found.name_of(key_a)}: found shape {[rank, groups]}, expected [{rank}, {in_features}], or "
            f"{in_features} / qalora_group_size={size} columns"
        )
    return a_RG.repeat_interleave(size, dim=1) * (groups / size), b_OR
