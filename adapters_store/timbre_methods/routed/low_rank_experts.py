"""Experts that are LoRAs, as the formats of mixtures here name and read them.

An expert's tensors are ``<path>.experts.<number>.lora_A.weight`` [R, I] and ``lora_B.weight`` [O, R]; ranks
may differ. Each adapted layer has all experts, numbered from 0: how many, the config says, since a file that
lost its last one would look whole. This module knows no router.

Legend: T tokens, I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite
from timbre_methods.contract import Site, Tensors
from timbre_methods.errors import InvalidConfig
from timbre_methods.examples import random_tensor, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import LowRank
from timbre_methods.routing import MAX_EXPERTS
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_of_site

NumExperts = Annotated[int, Field(ge=1, le=MAX_EXPERTS)]
Scales = Annotated[list[Finite], Field(min_length=1, max_length=MAX_EXPERTS)]
"""One for each expert: its alpha / r, or alpha / sqrt(r) with rsLoRA."""

Factors = tuple[Tensor, Tensor]
"""A [R, I] and B [O, R] of one expert."""


def expert_keys(num_experts: int, name: str = "experts") -> frozenset[str]:
    """The keys of all experts of one name."""
    return frozenset(f"{name}.{e}.{factor}" for e in range(num_experts) for factor in FACTORS)


def read_experts(found: SiteTensors, num_experts: int, name: str = "experts") -> list[Factors]:
    """The factors of each, float32 copies. Raises `InvalidTensors`."""
    return [_read_expert(found, f"{name}.{e}.") for e in range(num_experts)]


def _read_expert(found: SiteTensors, stem: str) -> Factors:
    key_a, key_b = (stem + factor for factor in FACTORS)
    a_RI = found.need(key_a, ("r", found.site.in_features))
    b_OR = found.need(key_b, (found.site.out_features, a_RI.shape[0]))
    return a_RI.to(torch.float32, copy=True), b_OR.to(torch.float32, copy=True)


def scaled_experts(experts: Sequence[Factors], scales: Sequence[float]) -> tuple[tuple[LowRank], ...]:
    """As parts, each with its scale in B."""
    return tuple((LowRank(a_RI, b_OR * scale),) for (a_RI, b_OR), scale in zip(experts, scales, strict=True))


def single_ranks(a_RI: Tensor, b_OR: Tensor) -> tuple[tuple[LowRank], ...]:
    """Each rank of one LoRA as an expert of its own."""
    return tuple((LowRank(a_RI[r : r + 1], b_OR[:, r : r + 1]),) for r in range(len(a_RI)))


def check_top_k(peft_type: str, key: str, top_k: int, num_experts: int) -> None:
    """Raises `InvalidConfig` where more experts are to be kept than there are."""
    if top_k > num_experts:
        raise InvalidConfig(
            f"{peft_type}: {key}: found {top_k}, expected at most {num_experts}, the number of experts"
        )


def plain_output(site: Site, x_TI: Tensor) -> Tensor:
    """``W x + b`` in x's dtype; for references."""
    bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
    return torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)


def largest(values_TE: Tensor, count: int) -> Tensor:
    """Which values are among a row's largest; for references."""
    return torch.zeros_like(values_TE, dtype=torch.bool).scatter(1, values_TE.topk(count).indices, True)


def reference_deltas(tensors: Tensors, site: Site, num_experts: int, dtype: torch.dtype) -> list[Tensor]:
    """``B A`` [O, I] of each expert of a site, without its scale; none where it is not adapted."""
    own = tensors_of_site(tensors, site, expert_keys(num_experts))
    if not own:
        return []
    pairs = [tuple(own[f"experts.{e}.{factor}"].to(dtype) for factor in FACTORS) for e in range(num_experts)]
    return [torch.einsum("or,ri->oi", b_OR, a_RI) for a_RI, b_OR in pairs]


def example_experts(
    site: Site, num_experts: int, generator: torch.Generator, name: str = "experts", rank: int | None = None
) -> dict[str, Tensor]:
    """Random experts of one site by full names, with one rank for all of them or each with its own."""
    tensors = {}
    for e in range(num_experts):
        own = whole_number(1, 3, generator) if rank is None else rank
        stem = f"{PREFIX}{site.path}.{name}.{e}."
        tensors[stem + FACTORS[0]] = random_tensor((own, site.in_features), generator)
        tensors[stem + FACTORS[1]] = random_tensor((site.out_features, own), generator)
    return tensors
