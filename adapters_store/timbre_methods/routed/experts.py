"""Experts that are LoRAs of one size, whatever format their file has, and the block that their router reads.

Legend: I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.routing import Router, Rule
from timbre_methods.site_tensors import SiteTensors, nearest_fact

Keys = tuple[str, str]
"""Of A and B."""


@dataclass(frozen=True, slots=True)
class LoraSize:
    """What a config says of a LoRA: ``y += scale · B (A x)``, A [rank, I]."""

    rank: int
    scale: float


def low_rank(found: SiteTensors, keys: Keys, size: LoraSize) -> LowRank:
    """The LoRA under two keys. Raises `InvalidTensors`."""
    site = found.site
    a_RI = found.need(keys[0], (size.rank, site.in_features))
    b_OR = found.need(keys[1], (site.out_features, size.rank))
    return LowRank(a_RI.to(torch.float32, copy=True), b_OR.to(torch.float32) * size.scale)


def only_lora(found: SiteTensors, keys: Keys, size: LoraSize) -> LowRank:
    """As `low_rank`, of a layer that has no other tensor."""
    refuse_others(found, keys, "a layer has experts and a router, or one LoRA")
    return low_rank(found, keys, size)


def low_rank_experts(
    found: SiteTensors, keys_of: Callable[[int], Keys], num_experts: int, size: LoraSize
) -> tuple[tuple[LowRank], ...]:
    """One LoRA each; ``keys_of`` tells an expert's keys by its number. Raises `InvalidTensors`."""
    return tuple((low_rank(found, keys_of(e), size),) for e in range(num_experts))


def router_of(found: SiteTensors, key: str, num_experts: int, rule: Rule) -> Router:
    """The router without a bias whose weight [E, I] is under a key. Raises `InvalidTensors`."""
    weight_EI = found.need(key, (num_experts, found.site.in_features))
    return Router(weight_EI.to(torch.float32, copy=True), rule)


def refuse_others(found: SiteTensors, keys: Collection[str], reason: str) -> None:
    """Raise `InvalidTensors` for a tensor of the site under any further key."""
    other = next((key for key in found.tensors if key not in keys), None)
    if other is not None:
        raise InvalidTensors(f"{found.name_of(other)} is surplus: {reason}")


def block_of(name: str, path: str, sites: Sites) -> Site:
    """The block of the base under a path that a router's name gives. Raises `AdapterMismatch`."""
    site = sites.get(path)
    if site is not None and site.kind == "block":
        return site
    if site is None and not any(other.startswith(f"{path}.") for other in sites):
        raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")
    raise AdapterMismatch(
        f"{name[:200]}: {path[:120]!r} of this base is no block whose input can choose experts: "
        "such a one turns rows into rows of their own size, and has linear layers and no attention in it"
    )


def above(path: str, blocks: Collection[str]) -> str | None:
    """The innermost of these blocks that a layer lies in."""
    while path := path.rpartition(".")[0]:
        if path in blocks:
            return path
    return None
