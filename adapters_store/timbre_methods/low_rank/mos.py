"""MoS, mixture of shards: LoRA whose vectors are joined from shards of a pool, ``y = W x + b + s B A x``.

All layers of one kind (the last step of their path) have a pool for A and one for B. Row j of A is the shards
``indices_A[j, 0], indices_A[j, 1], …`` one after the other, column j of B likewise from a list of its own.
There is no router: the lists are fixed. ``s = alpha / r``. The released code saves A and B joined, which is a
plain LoRA.

Legend: T tokens, I in features, O out features, R rank, L shards in a vector, N shards in a pool.

Paper: arXiv 2410.00938 section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, check_tensor, tensors_by_site, tensors_of_site

INDICES = ("mos_indices_A", "mos_indices_B")
KEYS = frozenset(INDICES)
INTEGERS = (torch.int32, torch.int64)


class MosConfig(PeftConfig):
    """``shards`` in a vector; ``pool_sizes`` by kind of layer, of both pools."""

    r: Rank
    lora_alpha: Finite
    shards: Count
    pool_sizes: dict[Annotated[str, Field(max_length=128)], Count]


class Mos(Method[MosConfig]):
    name = "mos"
    paper = "arXiv 2410.00938"
    stored = "for each kind of layer a pool of shards for A and for B; lists [r, l] of places"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MOS"

    def parse(self, raw_config: Mapping[str, Any]) -> MosConfig:
        return read_config(MosConfig, raw_config)

    def compile(self, config: MosConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        adapted = _by_site(config, tensors, sites)
        used = {pool for found in adapted for pool in _pools(_kind(found.site))}
        unused = {name for kind in config.pool_sizes for name in _pools(kind) if name not in used}
        surplus = next((name for name in tensors if name in unused), None)
        if surplus is not None:
            raise InvalidTensors(f"{surplus} is surplus: no adapted layer is of its kind")
        return AdapterProgram({found.site.path: (_part(config, tensors, found),) for found in adapted})

    def check_values(self, config: MosConfig, tensors: Tensors, sites: Sites) -> None:
        for found in _by_site(config, tensors, sites):
            size = config.pool_sizes[_kind(found.site)]
            for key in INDICES:
                low, high = (int(value) for value in found.tensors[key].aminmax())
                if low < 0 or high >= size:
                    raise InvalidTensors(
                        f"{found.name_of(key)}: found places {low} to {high}, expected 0 to {size - 1}"
                    )

    def reference(self, config: MosConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            a, b = (
                [
                    torch.cat([tensors[pool][place].to(x_TI.dtype) for place in row])
                    for row in own[key].tolist()
                ]
                for key, pool in zip(INDICES, _pools(_kind(site)), strict=True)
            )
            delta_OI = sum(torch.outer(column, row) for column, row in zip(b, a, strict=True))
            weight_OI = weight_OI + config.lora_alpha / config.r * delta_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank, shards = whole_number(1, 4, generator), whole_number(1, 3, generator)
        fitting = {
            path: site
            for path, site in sites.items()
            if not any(size % shards for size in site.weight_OI.shape)
        }
        chosen = chosen_sites(fitting, generator)
        sizes = {kind: whole_number(3, 8, generator) for kind in dict.fromkeys(map(_kind, chosen))}
        tensors = {}
        for kind, size in sizes.items():
            out_features, in_features = next(site.weight_OI.shape for site in chosen if _kind(site) == kind)
            for pool, width in zip(_pools(kind), (in_features, out_features), strict=True):
                tensors[pool] = random_tensor((size, width // shards), generator)
        for site in chosen:
            for key in INDICES:
                places = torch.randint(0, sizes[_kind(site)], (rank, shards), generator=generator)
                tensors[f"{PREFIX}{site.path}.{key}"] = places.int()
        config = {
            "peft_type": "MOS",
            "r": rank,
            "lora_alpha": whole_number(1, 8, generator),
            "shards": shards,
            "pool_sizes": sizes,
        }
        return config, tensors


def _kind(site: Site) -> str:
    return site.path.rpartition(".")[2]


def _pools(kind: str) -> tuple[str, str]:
    return f"base_model.mos_pool_A.{kind}", f"base_model.mos_pool_B.{kind}"


def _by_site(config: MosConfig, tensors: Tensors, sites: Sites) -> list[SiteTensors]:
    beside = {name for kind in config.pool_sizes for name in _pools(kind)}
    return list(tensors_by_site(tensors, sites, KEYS, beside=beside))


def _part(config: MosConfig, tensors: Tensors, found: SiteTensors) -> LowRank:
    site, kind = found.site, _kind(found.site)
    if kind not in config.pool_sizes:
        raise InvalidConfig(
            f"adapter_config.json: pool_sizes: expected a size for {kind[:100]!r}, found none"
        )
    if site.in_features % config.shards or site.out_features % config.shards:
        raise InvalidTensors(
            f"{site.path}: found a layer of {site.out_features} x {site.in_features}, "
            f"expected multiples of {config.shards} shards"
        )
    factors = []
    for pool, key, size in zip(_pools(kind), INDICES, (site.in_features, site.out_features), strict=True):
        if pool not in tensors:
            raise InvalidTensors(f"{pool} is missing, while {found.name_of(key)} refers to it")
        check_tensor(pool, tensors[pool], (config.pool_sizes[kind], size // config.shards))
        places_RL = found.need(key, (config.r, config.shards), INTEGERS).long()
        factors.append(tensors[pool].to(torch.float32)[places_RL].flatten(1))
    return LowRank(a_RI=factors[0], b_OR=factors[1].T * (config.lora_alpha / config.r))
