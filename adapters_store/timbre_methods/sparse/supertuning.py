"""Super-Tuning and its hybrid Supra, as PEFT saves them: ``y = (W + S) x + b + (alpha / r) B A x``.

S holds the stored values at the ``int(O I (1 - sparsity))`` weights of largest (or smallest) magnitude, in
the order of those magnitudes. Their flat row-major indices are in the file, unless it was saved with
``save_precomputed_indices=false``: then they are found again, once, from this base's own weights. Two equal
magnitudes among them have no order that two sorts agree on, so such a file is refused. A and B are there
with an ``r``; ``alpha`` is 2 r unless the config says otherwise.

Legend: T tokens, I in features, O out features, N stored values, R rank.

Paper: arXiv 2607.09287.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, LowRank, Part
from timbre_methods.site_tensors import (
    PREFIX,
    SiteTensors,
    derived_name,
    derived_of_site,
    tensors_by_site,
    tensors_of_site,
)
from timbre_methods.sparse.places import INDEX_DTYPES, check_cells, sparse_cells

VALUES, INDICES = "supertuning_values", "supertuning_indices"
LORA_A, LORA_B = "supertuning_lora_A.weight", "supertuning_lora_B.weight"
KEYS = frozenset({VALUES, INDICES, LORA_A, LORA_B})
CELLS = "cells"
"""The derived flat indices, int64, where the file leaves them out."""


class SupertuningConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "lora_dropout"})

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.99
    select_top: bool = True
    r: Rank | None = None
    lora_alpha: Finite | None = None
    save_precomputed_indices: bool = True

    def count(self, site: Site) -> int:
        """How many values a layer has; in Python floats, as PEFT counts."""
        return int(site.out_features * site.in_features * (1 - self.sparsity))


class Supertuning(Method[SupertuningConfig]):
    name = "supertuning"
    paper = "arXiv 2607.09287"
    stored = "n values, their flat indices; A [r, in], B [out, r] with an r"
    regenerated = "left-out indices, from the base's magnitudes"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SUPERTUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> SupertuningConfig:
        config = read_config(SupertuningConfig, raw_config)
        if config.lora_alpha is not None and config.r is None:
            raise InvalidConfig("adapter_config.json: lora_alpha: expected null without an r")
        return config

    def derive(self, config: SupertuningConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        if config.save_precomputed_indices:
            return {}
        return {
            derived_name(found.site.path, CELLS): _cells_by_magnitude(config, found.site)
            for found in tensors_by_site(tensors, sites, KEYS)
        }

    def compile(self, config: SupertuningConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: _parts(config, found) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: SupertuningConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            if config.save_precomputed_indices:
                check_cells(found.name_of(INDICES), found.site, found.tensors[INDICES])

    def reference(self, config: SupertuningConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            cells_N = own.get(INDICES, derived_of_site(tensors, site.path).get(CELLS))
            assert cells_N is not None
            values_N = own[VALUES].to(x_TI.dtype)
            weight_OI = weight_OI.flatten().scatter_add(0, cells_N.long(), values_N).view_as(weight_OI)
        if LORA_A in own:
            b_OR, a_RI = own[LORA_B].to(x_TI.dtype), own[LORA_A].to(x_TI.dtype)
            alpha = 2 * len(a_RI) if config.lora_alpha is None else config.lora_alpha
            weight_OI = weight_OI + alpha / len(a_RI) * torch.einsum("or,ri->oi", b_OR, a_RI)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        rank = 2 if coin(generator) else None
        config = SupertuningConfig(
            sparsity=0.9 if coin(generator) else 0.75,
            select_top=coin(generator),
            r=rank,
            lora_alpha=3.5 if rank and coin(generator) else None,
            save_precomputed_indices=coin(generator),
        )
        tensors = {}
        for site in chosen:
            stem, count = PREFIX + site.path, config.count(site)
            tensors[f"{stem}.{VALUES}"] = random_tensor((count,), generator)
            if config.save_precomputed_indices:
                tensors[f"{stem}.{INDICES}"] = _cells_by_magnitude(config, site).to(torch.int32)
            if rank:
                tensors[f"{stem}.{LORA_A}"] = random_tensor((rank, site.in_features), generator)
                tensors[f"{stem}.{LORA_B}"] = random_tensor((site.out_features, rank), generator)
        options = {
            **config.model_dump(),
            "init_weights": True,
            "lora_dropout": 0.0,
            "modules_to_save": None,
        }
        return peft_file("SUPERTUNING", chosen, options), tensors


def _parts(config: SupertuningConfig, found: SiteTensors) -> tuple[Part, ...]:
    site, count = found.site, config.count(found.site)
    values_N = found.need(VALUES, ("n",))
    if len(values_N) != count:
        raise InvalidTensors(
            f"{found.name_of(VALUES)}: found {len(values_N)} values, the config says {count} "
            f"(sparsity {config.sparsity} of {site.out_features} x {site.in_features})"
        )
    if config.save_precomputed_indices:
        cells_N = found.need(INDICES, (count,), INDEX_DTYPES)
    elif INDICES in found.tensors:
        raise InvalidTensors(
            f"{found.name_of(INDICES)} is surplus: the config says save_precomputed_indices=false"
        )
    else:
        cells_N = found.derived[CELLS]
    sparse = sparse_cells(site, cells_N, values_N)
    if config.r is None:
        extra = next((key for key in (LORA_A, LORA_B) if key in found.tensors), None)
        if extra is not None:
            raise InvalidTensors(f"{found.name_of(extra)} is surplus: the config says r=null")
        return (sparse,)
    return sparse, _low_rank(config, found, config.r)


def _low_rank(config: SupertuningConfig, found: SiteTensors, rank: int) -> LowRank:
    a_RI = found.need(LORA_A, (rank, found.site.in_features))
    b_OR = found.need(LORA_B, (found.site.out_features, rank))
    s = 2.0 if config.lora_alpha is None else config.lora_alpha / rank
    return LowRank(a_RI=a_RI.to(torch.float32, copy=True), b_OR=b_OR.to(torch.float32) * s)


def _cells_by_magnitude(config: SupertuningConfig, site: Site) -> Tensor:
    """The flat indices in the order of their magnitudes. Raises `InvalidTensors` where two of them tie."""
    magnitudes = site.weight_OI.flatten().abs()
    count = config.count(site)
    first = torch.topk(magnitudes, min(count + 1, len(magnitudes)), largest=config.select_top)
    ties = first.values[1:] == first.values[:-1]
    if not ties.is_meta and bool(ties.any()):
        raise InvalidTensors(
            f"{PREFIX}{site.path}.{VALUES}: {int(ties.sum())} of the base's magnitudes here tie, so that "
            "nothing tells which value belongs to which weight; save with save_precomputed_indices=True"
        )
    return first.indices[:count].clone()
