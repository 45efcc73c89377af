"""LoCA: ``y = (W + scale C_Oᵀ S C_I) x + b`` in orthonormal DCT-II bases C, with learned places.

The places are floats, trained between 0 and 1; l means ``round(clamp(l, 0, 0.999) (n - 1))`` on an axis of n.
That is computed in the precision in which they are stored, as training did: in another one many of them come
out as neighbours. Equal places add.

Legend: T tokens, I in features, O out features, N stored coefficients, n one of I and O.

Paper: arXiv 2502.06820.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Places, Spectral
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.spectral.sdctft import check_places

SPECTRUM, INDICES = "spectrum", "spectrum_indices"
KEYS = frozenset({SPECTRUM, INDICES})
LAST = 0.999
"""The highest location; what is above is taken for it."""


class LocaConfig(PeftConfig):
    scale: Finite


class Loca(Method[LocaConfig]):
    name = "loca"
    paper = "arXiv 2502.06820"
    stored = "n coefficients, their places as fractions"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LOCA"

    def parse(self, raw_config: Mapping[str, Any]) -> LocaConfig:
        return read_config(LocaConfig, raw_config)

    def compile(self, config: LocaConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: LocaConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            check_places(found, INDICES, *_places(found))

    def reference(self, config: LocaConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = x_TI @ site.weight_OI.to(x_TI.dtype).T
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            sizes = torch.tensor([[site.out_features], [site.in_features]], dtype=own[INDICES].dtype)
            cells = ((sizes - 1) * own[INDICES].clamp(0, LAST)).round().long()
            for a, row, column in zip(own[SPECTRUM].to(x_TI.dtype), *cells.tolist(), strict=True):
                u_O, v_I = (
                    _cosine(k, n, x_TI.dtype)
                    for k, n in ((row, site.out_features), (column, site.in_features))
                )
                y_TO = y_TO + config.scale * a * torch.outer(x_TI @ v_I, u_O)
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors = {}
        for site in chosen:
            count = whole_number(12, 24, generator)
            tensors[f"{PREFIX}{site.path}.{SPECTRUM}"] = random_tensor((count,), generator)
            tensors[f"{PREFIX}{site.path}.{INDICES}"] = torch.rand(2, count, generator=generator)
        return peft_file("LOCA", chosen, {"scale": 1.0 + whole_number(0, 9, generator)}), tensors


def _places(found: SiteTensors) -> tuple[Tensor, Tensor]:
    count = found.need(SPECTRUM, ("n",)).numel()
    indices = found.need(INDICES, (2, count)).clamp(0, LAST)
    rows_N, columns_N = (
        (location_N * (n - 1)).round().to(torch.int64)
        for location_N, n in zip(indices, (found.site.out_features, found.site.in_features), strict=True)
    )
    return rows_N, columns_N


def _part(config: LocaConfig, found: SiteTensors) -> Spectral:
    c_N = found.need(SPECTRUM, ("n",)).to(torch.float32) * config.scale
    site = found.site
    return Spectral(c_N, Places("dct", site.out_features, site.in_features, *_places(found), is_own=True))


def _cosine(k: int, n: int, dtype: torch.dtype) -> Tensor:
    """Row k of the orthonormal DCT-II of length n."""
    row = [math.cos(math.pi * k * (2 * p + 1) / (2 * n)) for p in range(n)]
    return torch.tensor(row, dtype=dtype) * math.sqrt((2 if k else 1) / n)
