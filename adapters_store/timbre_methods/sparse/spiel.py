"""SpIEL, as the SFT fork of PEFT saves it: ``y = (W + S) x + b``, S sparse, its values at flat cells.

``num_deltas`` in the config gives each layer its number of values; a layer may have none. Cells are int32 or
int64. The trainer drops and regrows them, so they need not be sorted.

Legend: T tokens, I in features, O out features, N stored values.

Paper: arXiv 2401.16405.
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
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import INDEX_DTYPES, check_cells, sparse_cells

VALUES, INDICES = "sft_delta.values", "sft_delta.indices"
KEYS = frozenset({VALUES, INDICES})


class SpielConfig(PeftConfig):
    """The field that matters at inference. The default is the fork's; it fills it in when it trains."""

    inert = frozenset(
        {
            "candidate_reselection_proportion",
            "candidate_reselection_steps",
            "density",
            "dtype",
            "initial_reselection_rate",
            "num_tunable_weights",
            "reselection_steps",
            "selection_accumulation_steps",
            "selection_algorithm",
        }
    )

    num_deltas: dict[str, Annotated[int, Field(ge=0, le=2**31 - 1)]] | None = None


class Spiel(Method[SpielConfig]):
    name = "spiel"
    paper = "arXiv 2401.16405"
    stored = "n values, their flat indices"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SFT"

    def parse(self, raw_config: Mapping[str, Any]) -> SpielConfig:
        return read_config(SpielConfig, raw_config)

    def compile(self, config: SpielConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        program = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            cells_N, values_N = _read(config, found)
            if len(values_N):
                program[found.site.path] = (sparse_cells(found.site, cells_N, values_N),)
        return AdapterProgram(program)

    def check_values(self, config: SpielConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            cells_N, _ = _read(config, found)
            if len(cells_N):
                check_cells(found.name_of(INDICES), found.site, cells_N)

    def reference(self, config: SpielConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            cells_N, values_N = own[INDICES].long(), own[VALUES].to(x_TI.dtype)
            weight_OI = weight_OI.flatten().scatter_add(0, cells_N, values_N).view_as(weight_OI)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors, counts = chosen_sites(sites, generator), {}, {}
        for site in chosen:
            size = site.out_features * site.in_features
            counts[site.path] = count = whole_number(3, size // 4, generator)
            cells_N = torch.randperm(size, generator=generator)[:count].to(torch.int32)
            tensors[f"{PREFIX}{site.path}.{VALUES}"] = random_tensor((count,), generator)
            tensors[f"{PREFIX}{site.path}.{INDICES}"] = cells_N
        options = {
            "density": 0.01,
            "num_tunable_weights": None,
            "num_deltas": counts,
            "selection_algorithm": "sm3" if coin(generator) else "rigl",
            "reselection_steps": 20,
            "dtype": "float32",
            "modules_to_save": None,
        }
        return peft_file("SFT", chosen, options), tensors


def _read(config: SpielConfig, found: SiteTensors) -> tuple[Tensor, Tensor]:
    """Cells and values of one site; both may be empty where the config says so."""
    if config.num_deltas is None:
        count = len(found.need(VALUES, ("n",)))
    else:
        known = config.num_deltas.get(found.site.path)
        if known is None:
            name = next(iter(map(found.name_of, found.tensors)))
            raise InvalidTensors(f"{name} is surplus: the config's num_deltas does not name this layer")
        count = known
    return found.need(INDICES, (count,), INDEX_DTYPES), found.need(VALUES, (count,))
