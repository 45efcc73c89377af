"""Activated LoRA, as PEFT saves it: a LoRA that acts only from an invocation sequence on.

    y_t = W x_t + b                    t < p
    y_t = W x_t + b + s (B A x_t + c)  t ≥ p

``p`` is where the last occurrence of the invocation tokens in a request's prompt begins; whatever is
generated comes after it. KV entries before ``p`` are the base's own. A prompt without the sequence is for
PEFT one for the base; here it is refused, since an answer in an adapter's name is never the base's.

Legend: T tokens.

Paper: arXiv 2504.12397.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import is_on
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import coin, whole_number
from timbre_methods.low_rank.lora import VARIANTS, Lora, LoraConfig, lora_example, read_lora_config
from timbre_methods.program import AdapterProgram

SWITCH = "alora_invocation_tokens"
MAX_INVOCATION_TOKENS = 256
"""Every prompt is searched for them."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class AloraConfig(LoraConfig):
    """LoRA's fields, and the sequence from whose last occurrence on the adapter acts.

    Whole layers beside it would act before the invocation, too, in PEFT.
    """

    takes_beside = False

    alora_invocation_tokens: list[TokenId] = Field(min_length=1, max_length=MAX_INVOCATION_TOKENS)


class Alora(Method[AloraConfig]):
    name = "alora"
    paper = "arXiv 2504.12397"
    stored = "A [r, in], B [out, r]; c [out] with lora_bias"
    checked_against = "PEFT"
    may_be_stacked = True

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        switches = {switch for switch in VARIANTS if is_on(raw_config.get(switch))}
        return raw_config.get("peft_type") == "LORA" and switches == {SWITCH}

    def parse(self, raw_config: Mapping[str, Any]) -> AloraConfig:
        return read_lora_config(AloraConfig, raw_config)

    def compile(self, config: AloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        program = Lora().compile(config, tensors, sites)
        return replace(program, invocation_tokens=tuple(config.alora_invocation_tokens))

    def reference(self, config: AloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        """Of rows on which the adapter acts."""
        return Lora().reference(config, tensors, site, x_TI)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config, tensors = lora_example(sites, generator, with_bias=coin(generator))
        tokens = [whole_number(0, 99, generator) for _ in range(whole_number(1, 4, generator))]
        return {**config, SWITCH: tokens}, tensors
