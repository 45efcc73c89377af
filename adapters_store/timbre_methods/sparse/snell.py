"""SNELL: a kernel matrix, sparsified, as a change of the weight: ``y = W x + b + D x``.

``K[o, i] = 0.1 (|p_o − q_i| − |p'_o − q'_i|)`` from two pairs of point sets, by Euclidean distances. With a
``threshold`` of 0, ``D = K``. Else the entries with ``|K|`` above that quantile of all ``|K|`` survive as
``K |K|``: the released code multiplies what survives by its own magnitude, unlike the paper's soft threshold,
and files are trained with that. D is as large as the weight and of full rank: it is made once, and kept dense
unless few entries survive.

Legend: T tokens, I in features, O out features, C rows in one piece, D dimensions of the points, 2 signs.

Paper: arXiv 2411.01800; its released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense, Sparse
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import sparse_cells

IN_POINTS, OUT_POINTS = "snell_in", "snell_out"
KEYS = frozenset({IN_POINTS, OUT_POINTS})
COEFFICIENT = 0.1

DENSE_FROM = 0.1
"""The share of survivors from which a dense product is the cheaper one."""
MAX_DIMENSIONS = 512
"""Of the points; the work of a load grows with them, and the paper uses 4 to 32."""
MAX_RANKED = 2**24
"""Entries of a layer that are ranked for a threshold; the released code cannot rank more either."""
ROWS_AT_ONCE = 256
"""Rows of K whose distances are widened together, so that a large layer needs little memory beside K."""


Threshold = Annotated[float, Field(ge=0, lt=1)]


class SnellConfig(PeftConfig):
    """The field that matters at inference: ``init_thres`` of the released code."""

    threshold: Threshold = 0.0


class Snell(Method[SnellConfig]):
    name = "snell"
    paper = "arXiv 2411.01800"
    stored = "points [2, in, q / 2] and [2, out, q / 2]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SNELL"

    def parse(self, raw_config: Mapping[str, Any]) -> SnellConfig:
        return read_config(SnellConfig, raw_config)

    def compile(self, config: SnellConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: SnellConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        delta_OI = torch.zeros(site.out_features, site.in_features, dtype=x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            apart_2OID = own[OUT_POINTS].unsqueeze(2) - own[IN_POINTS].unsqueeze(1)
            plus_OI, minus_OI = apart_2OID.square().sum(-1).sqrt()
            delta_OI = 0.1 * plus_OI - 0.1 * minus_OI
            if config.threshold > 0:
                magnitude_OI = delta_OI.abs()
                edge = torch.quantile(magnitude_OI.flatten(), config.threshold)
                delta_OI = delta_OI * torch.where(magnitude_OI > edge, magnitude_OI, 0.0)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype) + delta_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        threshold = (0.0, 0.5, 0.95)[whole_number(0, 2, generator)]
        for site in chosen:
            dimensions, stem = whole_number(1, 4, generator), PREFIX + site.path
            tensors[f"{stem}.{IN_POINTS}"] = 8 * random_tensor((2, site.in_features, dimensions), generator)
            tensors[f"{stem}.{OUT_POINTS}"] = 8 * random_tensor((2, site.out_features, dimensions), generator)
        return peft_file("SNELL", chosen, {"threshold": threshold}), tensors


def _part(config: SnellConfig, found: SiteTensors) -> Dense | Sparse:
    kernel_OI = kernel_of(found)
    return Dense(kernel_OI) if config.threshold == 0 else sparsified(found, kernel_OI, config.threshold)


def num_survivors(site: Site, threshold: float) -> int:
    """How many entries lie above the quantile, if no two are equal."""
    size = site.out_features * site.in_features
    return size - 1 - math.floor(threshold * (size - 1))


def kernel_of(found: SiteTensors) -> Tensor:
    """K [O, I] of one site, in float32."""
    site = found.site
    q_2ID = found.need(IN_POINTS, (2, site.in_features, "q / 2"))
    if q_2ID.shape[2] > MAX_DIMENSIONS:
        raise InvalidTensors(
            f"{found.name_of(IN_POINTS)}: found {q_2ID.shape[2]} dimensions, "
            f"expected at most {MAX_DIMENSIONS}"
        )
    p_2OD = found.need(OUT_POINTS, (2, site.out_features, q_2ID.shape[2]))
    return _kernel(p_2OD, q_2ID)


def sparsified(found: SiteTensors, kernel_OI: Tensor, threshold: float) -> Dense | Sparse:
    """``K |K|`` where ``|K|`` is above its quantile, and 0 elsewhere."""
    site, size = found.site, kernel_OI.numel()
    if size > MAX_RANKED:
        raise InvalidTensors(
            f"{found.name_of(IN_POINTS)}: found a layer of {size} weights with a threshold, "
            f"expected at most {MAX_RANKED}; leave this layer out"
        )
    count = num_survivors(site, threshold)
    first = torch.topk(kernel_OI.flatten().abs(), count + 1)
    cells_N = first.indices[:count]
    values_N = kernel_OI.flatten()[cells_N]
    # The last one is at the quantile or below it: whatever is equal to it does not survive.
    values_N = values_N * torch.where(first.values[:count] > first.values[count], values_N.abs(), 0.0)
    if count < DENSE_FROM * size:
        return sparse_cells(site, cells_N, values_N)
    delta = torch.zeros_like(kernel_OI).flatten().index_put((cells_N,), values_N)
    return Dense(delta.view_as(kernel_OI))


def _kernel(p_2OD: Tensor, q_2ID: Tensor) -> Tensor:
    """K in float32, from distances in float64: it is a difference of near equals."""
    q_2ID = q_2ID.to(torch.float64)
    pieces = []
    for start in range(0, p_2OD.shape[1], ROWS_AT_ONCE):
        p_2CD = p_2OD[:, start : start + ROWS_AT_ONCE].to(torch.float64)
        distance_2CI = torch.cdist(p_2CD, q_2ID, compute_mode="donot_use_mm_for_euclid_dist")
        pieces.append((COEFFICIENT * (distance_2CI[0] - distance_2CI[1])).to(torch.float32))
    return torch.cat(pieces)
