"""WaRA on features: one pair of thin factors for both bands of a wavelet transform of the features.

    y = (W + scale G_Oᵀ (I₂ ⊗ B A) G_I) x + b

``G_n`` [n, n] is one level of the periodic transform of n features (n even): row k of its low half holds
``low[j]`` at place (2k + j) mod n, its high half likewise ``high[j] = (-1)^j low[L - 1 - j]``. That is a LoRA
of rank 2r, which is what it compiles to. A wavelet over tokens would mix a token with later ones, so there is
no such format.

Legend: T tokens, I in features, O out features, R rank, H = n/2, L taps of the filter.

Paper: arXiv 2506.24092.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.spectral.wavelets import LOW_PASS

A, B = "wara_A", "wara_B"
KEYS = frozenset({A, B})


class WaraConfig(PeftConfig):
    r: Rank
    scale: Finite
    wavelet: Annotated[str, Field(max_length=64)] = "db1"


class Wara(Method[WaraConfig]):
    name = "wara"
    paper = "arXiv 2506.24092"
    stored = "A [r, in / 2], B [out / 2, r]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "WARA"

    def parse(self, raw_config: Mapping[str, Any]) -> WaraConfig:
        config = read_config(WaraConfig, raw_config)
        if config.wavelet not in LOW_PASS:
            raise UnsupportedMethod(
                f"WARA: wavelet={shown(config.wavelet)} is not served; use one of {', '.join(LOW_PASS)}"
            )
        return config

    def compile(self, config: WaraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: WaraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        inner, outer = (
            _matrix(LOW_PASS[config.wavelet], n).to(x_TI.dtype) for n in (site.in_features, site.out_features)
        )
        bands = (inner @ x_TI.T).chunk(2)
        adapted = torch.cat([own[B] @ (own[A] @ band) for band in bands])
        return y_TO + config.scale * (outer.T @ adapted).T

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        even = {path: site for path, site in sites.items() if (site.out_features | site.in_features) % 2 == 0}
        chosen = chosen_sites(even, generator)
        r, families = whole_number(1, 3, generator), list(LOW_PASS)
        wavelet = families[whole_number(0, len(families) - 1, generator)]
        tensors = {}
        for site in chosen:
            tensors[f"{PREFIX}{site.path}.{A}"] = random_tensor((r, site.in_features // 2), generator)
            tensors[f"{PREFIX}{site.path}.{B}"] = random_tensor((site.out_features // 2, r), generator)
        return peft_file("WARA", chosen, {"r": r, "scale": 1.5, "wavelet": wavelet}), tensors


def _part(config: WaraConfig, found: SiteTensors) -> LowRank:
    site = found.site
    if site.out_features % 2 or site.in_features % 2:
        raise InvalidTensors(
            f"{found.name_of(A)}: found a layer of {site.out_features} x {site.in_features}, expected even "
            "numbers: a level of a wavelet halves them"
        )
    a_RH = found.need(A, (config.r, site.in_features // 2)).to(torch.float32)
    b_HR = found.need(B, (site.out_features // 2, config.r)).to(torch.float32)
    low = LOW_PASS[config.wavelet]
    return LowRank(a_RI=_both_bands(a_RH, low), b_OR=_both_bands(b_HR.T, low).T * config.scale)


def _both_bands(rows_RH: Tensor, low: tuple[float, ...]) -> Tensor:
    """``[V, 0] G`` over ``[0, V] G`` for V [R, n/2]: [2R, n]."""
    half, length = rows_RH.shape[1], len(low)
    starts_H1 = torch.arange(0, 2 * half, 2, device=rows_RH.device).unsqueeze(1)
    places_HL = (starts_H1 + torch.arange(length, device=rows_RH.device)) % (2 * half)
    low_L = torch.tensor(low, device=rows_RH.device)
    high_L = low_L.flip(0)
    high_L[1::2] *= -1
    bands = [
        rows_RH.new_zeros(len(rows_RH), 2 * half).index_add_(
            1, places_HL.flatten(), (rows_RH.unsqueeze(2) * taps_L).flatten(1)
        )
        for taps_L in (low_L, high_L)
    ]
    return torch.cat(bands)


def _matrix(low: tuple[float, ...], n: int) -> Tensor:
    """G_n, entry by entry."""
    matrix = torch.zeros(n, n, dtype=torch.float64)
    for k in range(n // 2):
        for j, tap in enumerate(low):
            matrix[k, (2 * k + j) % n] += tap
            matrix[n // 2 + k, (2 * k + len(low) - 1 - j) % n] += (-1) ** (len(low) - 1 - j) * tap
    return matrix
