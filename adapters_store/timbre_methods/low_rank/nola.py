"""NOLA: LoRA whose factors are sums of random matrices, ``y = W x + b + s B A x``.

``A = A_0 + Σ c_k A_k`` and ``B = B_0 + Σ d_k B_k``, ``s = alpha / r``. A file holds the frozen starts A_0 and
B_0, the coefficients, and a seed for each factor. The random matrices are uniform in [-1, 1), in some of the
paper's code divided by the root of their number. They come from torch's generator, whose streams differ
between a CPU and a GPU and between dtypes: only a CPU's float32 is served. They are many, so their sums are
derived once, at registration.

Legend: T tokens, I in features, O out features, R rank, K random matrices of one factor.

Paper: arXiv 2310.02556 equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Count, Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import (
    PREFIX,
    SiteTensors,
    derived_name,
    tensors_by_site,
    tensors_of_site,
)

FACTORS = ("lora_A", "lora_B")
KEYS = frozenset(f"{factor}.{key}" for factor in FACTORS for key in ("weight", "coefficients", "seed"))
SUMS = ("nola_A", "nola_B")

MAX_DRAWS = 2**33
"""The most random numbers that are drawn for one adapter: about a minute's work."""


class NolaConfig(PeftConfig):
    """``num_basis``: how many matrices; ``drawn_on``: where; ``normalised``: whether they were divided."""

    r: Rank
    lora_alpha: Finite
    num_basis_A: Count
    num_basis_B: Count
    normalised: bool
    drawn_on: Literal["cpu", "cuda"]


class Nola(Method[NolaConfig]):
    name = "nola"
    paper = "arXiv 2310.02556"
    stored = "A_0 [r, in], B_0 [out, r]; coefficients [k] and a seed for each"
    regenerated = "k random matrices for each factor, from the seed, once at registration"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "NOLA"

    def parse(self, raw_config: Mapping[str, Any]) -> NolaConfig:
        config = read_config(NolaConfig, raw_config)
        if config.drawn_on != "cpu":
            raise UnsupportedMethod(
                "NOLA: drawn_on='cuda' is not served: the random matrices cannot be drawn again elsewhere; "
                "add them up on a machine of that kind and save A and B as a plain LORA"
            )
        return config

    def derive(self, config: NolaConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        adapted = list(tensors_by_site(tensors, sites, KEYS))
        draws = sum(
            _coefficients(config, found, side).numel() * math.prod(shape)
            for found in adapted
            for side, shape in enumerate(_shapes(config, found.site))
        )
        if draws > MAX_DRAWS:
            raise InvalidConfig(
                f"NOLA: {draws} random numbers are not drawn, the limit is {MAX_DRAWS}: "
                "add the matrices up and save A and B as a plain LORA"
            )
        return {
            derived_name(found.site.path, SUMS[side]): _sum(config, found, side, shape)
            for found in adapted
            for side, shape in enumerate(_shapes(config, found.site))
        }

    def compile(self, config: NolaConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (self._part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def _part(self, config: NolaConfig, found: SiteTensors) -> LowRank:
        factors = []
        for side, shape in enumerate(_shapes(config, found.site)):
            start = found.need(f"{FACTORS[side]}.weight", shape)
            _coefficients(config, found, side)
            found.need(f"{FACTORS[side]}.seed", (1,), (torch.int64,))
            factors.append(start.to(torch.float32) + found.derived[SUMS[side]])
        return LowRank(a_RI=factors[0], b_OR=factors[1] * (config.lora_alpha / config.r))

    def reference(self, config: NolaConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            factors = []
            for factor in FACTORS:
                start, c_K = own[f"{factor}.weight"], own[f"{factor}.coefficients"].to(x_TI.dtype)
                generator = torch.Generator().manual_seed(int(own[f"{factor}.seed"]))
                basis = torch.rand(len(c_K), *start.shape, generator=generator).to(x_TI.dtype) * 2 - 1
                if config.normalised:
                    basis = basis / len(c_K) ** 0.5
                factors.append(start.to(x_TI.dtype) + torch.einsum("k,kij->ij", c_K, basis))
            weight_OI = weight_OI + config.lora_alpha / config.r * factors[1] @ factors[0]
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = whole_number(1, 4, generator)
        counts = whole_number(1, 5, generator), whole_number(1, 5, generator)
        tensors = {}
        for site in chosen_sites(sites, generator):
            shapes = (rank, site.in_features), (site.out_features, rank)
            for factor, shape, count in zip(FACTORS, shapes, counts, strict=True):
                stem = f"{PREFIX}{site.path}.{factor}"
                tensors[f"{stem}.weight"] = random_tensor(shape, generator)
                tensors[f"{stem}.coefficients"] = random_tensor((count,), generator)
                tensors[f"{stem}.seed"] = torch.tensor([whole_number(0, 10**9, generator)])
        config = {
            "peft_type": "NOLA",
            "r": rank,
            "lora_alpha": whole_number(1, 8, generator),
            "num_basis_A": counts[0],
            "num_basis_B": counts[1],
            "normalised": coin(generator),
            "drawn_on": "cpu",
        }
        return config, tensors


def _shapes(config: NolaConfig, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
    return (config.r, site.in_features), (site.out_features, config.r)


def _coefficients(config: NolaConfig, found: SiteTensors, side: int) -> Tensor:
    count = (config.num_basis_A, config.num_basis_B)[side]
    return found.need(f"{FACTORS[side]}.coefficients", (count,))


def _sum(config: NolaConfig, found: SiteTensors, side: int, shape: tuple[int, int]) -> Tensor:
    """``Σ c_k M_k`` in float32; on meta nothing is drawn."""
    c_K = _coefficients(config, found, side).to(torch.float32)
    seed = found.need(f"{FACTORS[side]}.seed", (1,), (torch.int64,))
    total = torch.zeros(shape, device=c_K.device)
    if c_K.device.type == "meta":
        return total
    if config.normalised:
        c_K = c_K / math.sqrt(len(c_K))
    generator = torch.Generator().manual_seed(int(seed))
    for c in c_K.tolist():
        # One after the other: the stream is the same as for all at once.
        total.add_(torch.empty(shape).uniform_(-1, 1, generator=generator), alpha=c)
    return total
