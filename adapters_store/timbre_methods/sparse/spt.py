"""SPT, sensitivity-aware tuning: sparse values where few weights are sensitive, a low-rank pair elsewhere.

``y = (W + S) x + b + B A x + c``. A layer has S, or A and B, or both; c is there beside A and B with
``lora_bias``. The pair has no scale. The trainer's third form, a bottleneck with a GELU, is not linear in x
and has no place here.

Legend: T tokens, I in features, O out features, N stored values, R rank.

Paper: arXiv 2303.08566.
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
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import INDEX_DTYPES, check_cells, check_count, sparse_cells

VALUES, INDICES = "spt_values", "spt_indices"
LORA_A, LORA_B, LORA_BIAS = "spt_lora_A", "spt_lora_B", "spt_lora_bias"
KEYS = frozenset({VALUES, INDICES, LORA_A, LORA_B, LORA_BIAS})


class SptConfig(PeftConfig):
    """The field that matters at inference: the trainer's form ``lora_bias`` instead of ``lora``."""

    lora_bias: bool = False


class Spt(Method[SptConfig]):
    name = "spt"
    paper = "arXiv 2303.08566"
    stored = "n values, their flat indices; or A [r, in], B [out, r]; or both"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SPT"

    def parse(self, raw_config: Mapping[str, Any]) -> SptConfig:
        return read_config(SptConfig, raw_config)

    def compile(self, config: SptConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: tuple(_parts(config, found)) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: SptConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            if INDICES in found.tensors:
                check_cells(found.name_of(INDICES), found.site, found.tensors[INDICES])

    def reference(self, config: SptConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype, copy=True)
        own = tensors_of_site(tensors, site, KEYS)
        if VALUES in own:
            cells_N = own[INDICES].long()
            rows_N, columns_N = cells_N // site.in_features, cells_N % site.in_features
            weight_OI[rows_N, columns_N] += own[VALUES].to(x_TI.dtype)
        y_TO = x_TI @ weight_OI.T
        if LORA_A in own:
            z_TR = torch.nn.functional.linear(x_TI, own[LORA_A].to(x_TI.dtype))
            shift_O = own.get(LORA_BIAS)
            shift_O = None if shift_O is None else shift_O.to(x_TI.dtype)
            y_TO = y_TO + torch.nn.functional.linear(z_TR, own[LORA_B].to(x_TI.dtype), shift_O)
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors, with_bias = chosen_sites(sites, generator), {}, coin(generator)
        for number, site in enumerate(chosen):
            stem, size = PREFIX + site.path, site.out_features * site.in_features
            if number % 3 != 1:
                count = whole_number(1, size // 4, generator)
                tensors[f"{stem}.{VALUES}"] = random_tensor((count,), generator)
                cells_N = torch.randperm(size, generator=generator)[:count]
                tensors[f"{stem}.{INDICES}"] = cells_N.to(torch.int32)
            if number % 3 != 0:
                rank = whole_number(1, 3, generator)
                tensors[f"{stem}.{LORA_A}"] = random_tensor((rank, site.in_features), generator)
                tensors[f"{stem}.{LORA_B}"] = random_tensor((site.out_features, rank), generator)
                if with_bias:
                    tensors[f"{stem}.{LORA_BIAS}"] = random_tensor((site.out_features,), generator)
        return peft_file("SPT", chosen, {"lora_bias": with_bias}), tensors


def _parts(config: SptConfig, found: SiteTensors) -> list[Part]:
    site = found.site
    parts: list[Part] = []
    if VALUES in found.tensors or INDICES in found.tensors:
        values_N = found.need(VALUES, ("n",))
        check_count(found.name_of(VALUES), site, values_N)
        parts.append(sparse_cells(site, found.need(INDICES, (len(values_N),), INDEX_DTYPES), values_N))
    if not config.lora_bias and LORA_BIAS in found.tensors:
        raise InvalidTensors(f"{found.name_of(LORA_BIAS)} is surplus: the config says lora_bias=false")
    if any(key in found.tensors for key in (LORA_A, LORA_B, LORA_BIAS)):
        a_RI = found.need(LORA_A, ("r", site.in_features))
        b_OR = found.need(LORA_B, (site.out_features, len(a_RI)))
        parts.append(LowRank(a_RI.to(torch.float32, copy=True), b_OR.to(torch.float32, copy=True)))
        if config.lora_bias:
            shift_O = found.need(LORA_BIAS, (site.out_features,)).to(torch.float32, copy=True)
            parts.append(Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O))
    return parts
