"""Experts that are LoRAs, as the formats of mixtures name and read them.

An expert's tensors are ``experts.<number>.lora_A.weight`` [R, I] and ``lora_B.weight`` [O, R] after what the
layer's names begin with, unless a format calls them otherwise; ranks may differ unless the config has one.
Each adapted layer has all experts, numbered from 0: how many, the config says, since a file that lost its
last one would look whole. This module knows no router.

Legend: T tokens, I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
Keys = tuple[str, str]
"""Of A and B."""


@dataclass(frozen=True, slots=True)
class LoraSize:
    """What a config says of a LoRA: ``y += scale · B (A x)``, A [rank, I]."""

    rank: int
    scale: float


def expert_factors(number: int, name: str = "experts") -> Keys:
    """The keys of one expert's A and B."""
    key_a, key_b = (f"{name}.{number}.{factor}" for factor in FACTORS)
    return key_a, key_b


def expert_keys(num_experts: int, name: str = "experts") -> frozenset[str]:
    """The keys of all experts of one name."""
    return frozenset(key for e in range(num_experts) for key in expert_factors(e, name))


def read_experts(found: SiteTensors, num_experts: int, name: str = "experts") -> list[Factors]:
    """The factors of each, float32 copies. Raises `InvalidTensors`."""
    return [_read_factors(found, expert_factors(e, name), "r") for e in range(num_experts)]


def low_rank(found: SiteTensors, keys: Keys, size: LoraSize) -> LowRank:
    """The LoRA of one size under two keys. Raises `InvalidTensors`."""
    a_RI, b_OR = _read_factors(found, keys, size.rank)
    return LowRank(a_RI, b_OR * size.scale)


def only_lora(found: SiteTensors, keys: Keys, size: LoraSize) -> LowRank:
    """As `low_rank`, of a layer that has no other tensor."""
    found.refuse_others(keys, "a layer has experts and a router, or one LoRA")
    return low_rank(found, keys, size)


def experts_of_one_size(
    found: SiteTensors, num_experts: int, size: LoraSize, keys_of: Callable[[int], Keys] = expert_factors
) -> tuple[tuple[LowRank], ...]:
    """One LoRA each; ``keys_of`` tells an expert's keys by its number. Raises `InvalidTensors`."""
    return tuple((low_rank(found, keys_of(e), size),) for e in range(num_experts))


def _read_factors(found: SiteTensors, keys: Keys, rank: int | str) -> Factors:
    a_RI = found.need(keys[0], (rank, found.site.in_features))
    b_OR = found.need(keys[1], (found.site.out_features, a_RI.shape[0]))
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


def expert_deltas(own: Mapping[str, Tensor], num_experts: int) -> list[Tensor]:
    """``B A`` [O, I] of each expert of a layer, by its tensors; for references."""
    pairs = [[own[key] for key in expert_factors(e)] for e in range(num_experts)]
    return [torch.einsum("or,ri->oi", b_OR, a_RI) for a_RI, b_OR in pairs]


def reference_deltas(tensors: Tensors, site: Site, num_experts: int, dtype: torch.dtype) -> list[Tensor]:
    """`expert_deltas` of a site, without the scale; none where it is not adapted."""
    own = tensors_of_site(tensors, site, expert_keys(num_experts))
    return expert_deltas({key: t.to(dtype) for key, t in own.items()}, num_experts) if own else []


def example_lora(
    stem: str, keys: Keys, site: Site, rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Random factors of one site, under names that begin with ``stem``."""
    return {
        f"{stem}.{keys[0]}": random_tensor((rank, site.in_features), generator),
        f"{stem}.{keys[1]}": random_tensor((site.out_features, rank), generator),
    }


def example_experts(
    site: Site, num_experts: int, generator: torch.Generator, name: str = "experts", rank: int | None = None
) -> dict[str, Tensor]:
    """Random experts of one site by full names, with one rank for all of them or each with its own."""
    tensors: dict[str, Tensor] = {}
    for e in range(num_experts):
        own = whole_number(1, 3, generator) if rank is None else rank
        tensors |= example_lora(PREFIX + site.path, expert_factors(e, name), site, own, generator)
    return tensors
