"""SHiRA, as PEFT saves it: ``y = (W + S) x + b`` with S sparse.

The file holds the values and their (row, column) indices, in any order; indices are int32, or float32 in
files written on Windows. The mask's seed in the config is of no account.

Legend: T tokens, I in features, O out features, N stored values.

Paper: arXiv 2406.13175.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Sparse
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import check_places, sparse_part

VALUES, INDICES = "shira_weight", "shira_indices"
KEYS = frozenset({VALUES, INDICES})
INDEX_DTYPES = (torch.int32, torch.int64, torch.float32)


class ShiraConfig(PeftConfig):
    """Nothing of the config matters at inference: values and places are in the file."""

    inert = frozenset({"init_weights", "mask_type", "r", "random_seed"})


class Shira(Method[ShiraConfig]):
    name = "shira"
    paper = "arXiv 2406.13175"
    stored = "n values, their rows and columns"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SHIRA"

    def parse(self, raw_config: Mapping[str, Any]) -> ShiraConfig:
        return read_config(ShiraConfig, raw_config)

    def compile(self, config: ShiraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: ShiraConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            _check_indices(found)

    def reference(self, config: ShiraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype, copy=True)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            rows_N, columns_N = own[INDICES].to(torch.int64)
            weight_OI[rows_N, columns_N] += own[VALUES].to(x_TI.dtype)
        y_TO = x_TI @ weight_OI.T
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        index_dtype = torch.float32 if coin(generator) else torch.int32
        tensors = {}
        for site in chosen:
            size = site.out_features * site.in_features
            count = min(site.out_features + site.in_features, size)
            cells_N = torch.randperm(size, generator=generator)[:count].sort().values
            indices = torch.stack([cells_N // site.in_features, cells_N % site.in_features])
            tensors[f"{PREFIX}{site.path}.{VALUES}"] = random_tensor((count,), generator)
            tensors[f"{PREFIX}{site.path}.{INDICES}"] = indices.to(index_dtype)
        options = {
            "r": 1,
            "mask_type": "random",
            "random_seed": whole_number(0, 99, generator),
            "init_weights": True,
            "modules_to_save": None,
        }
        return peft_file("SHIRA", chosen, options), tensors


def _read(found: SiteTensors) -> tuple[Tensor, Tensor]:
    values_N = found.need(VALUES, ("n",))
    return values_N, found.need(INDICES, (2, values_N.shape[0]), INDEX_DTYPES)


def _part(found: SiteTensors) -> Sparse:
    values_N, indices = _read(found)
    rows_N, columns_N = indices
    return sparse_part(found.site, rows_N.to(torch.int64), columns_N, values_N)


def _check_indices(found: SiteTensors) -> None:
    _, indices = _read(found)
    name = found.name_of(INDICES)
    if indices.is_floating_point() and not torch.equal(indices, indices.round()):
        fraction = float(indices[indices != indices.round()][0])
        raise InvalidTensors(f"{name}: found the index {fraction}, expected whole numbers")
    rows_N, columns_N = indices.to(torch.int64)
    check_places(name, found.site, rows_N, columns_N)
