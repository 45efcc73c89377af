"""SaRA: the weights that hardly matter, ``|W| < threshold``, are given new values.

The file holds the new values themselves, in row-major order of their places, and neither places nor
differences. The places are found again, once, in this base's own weights, in their own dtype, and their
number must be the file's: one weight more or less would move every value behind it.

Legend: T tokens, I in features, O out features, N replaced weights.

Paper: arXiv 2409.06633.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, Sparse
from timbre_methods.site_tensors import (
    PREFIX,
    SiteTensors,
    derived_name,
    tensors_by_site,
    tensors_of_site,
)
from timbre_methods.sparse.places import sparse_cells

KEY = "sara_values"
KEYS = frozenset({KEY})
CELLS = "cells"
"""The derived flat places, int64."""


class SaraConfig(PeftConfig):
    """The field that matters at inference."""

    threshold: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]


class Sara(Method[SaraConfig]):
    name = "sara"
    paper = "arXiv 2409.06633"
    stored = "n new weights"
    regenerated = "their places, from the base's magnitudes"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SARA"

    def parse(self, raw_config: Mapping[str, Any]) -> SaraConfig:
        return read_config(SaraConfig, raw_config)

    def derive(self, config: SaraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        return {
            derived_name(found.site.path, CELLS): _cells_below(config, found)
            for found in tensors_by_site(tensors, sites, KEYS)
        }

    def compile(self, config: SaraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: SaraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype, copy=True)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            weight_OI[weight_OI.abs() < config.threshold] = own[KEY].to(x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        threshold = 0.25 if coin(generator) else 0.5
        chosen = chosen_sites(sites, generator)
        tensors = {}
        for site in chosen:
            count = int((site.weight_OI.abs() < threshold).sum())
            tensors[f"{PREFIX}{site.path}.{KEY}"] = random_tensor((count,), generator)
        return peft_file("SARA", chosen, {"threshold": threshold}), tensors


def _cells_below(config: SaraConfig, found: SiteTensors) -> Tensor:
    """Where the base's weights are below the threshold; as many as the file has values."""
    values_N, weight_OI = found.need(KEY, ("n",)), found.site.weight_OI
    if weight_OI.is_meta:
        return torch.empty(len(values_N), dtype=torch.int64, device="meta")
    cells_N = torch.nonzero(weight_OI.flatten().abs() < config.threshold).squeeze(1)
    if len(cells_N) != len(values_N):
        raise InvalidTensors(
            f"{found.name_of(KEY)}: found {len(values_N)} values, expected {len(cells_N)}: so many weights "
            f"of this base are below the threshold {config.threshold}; the adapter needs the very base, in "
            "the very dtype, that it was trained on"
        )
    return cells_N


def _part(found: SiteTensors) -> Sparse:
    values_N, cells_N = found.need(KEY, ("n",)), found.derived[CELLS]
    before_N = found.site.weight_OI.flatten()[cells_N].to(values_N.device, torch.float32)
    return sparse_cells(found.site, cells_N, values_N.to(torch.float32) - before_N)
