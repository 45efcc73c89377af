"""LoKr, as PEFT saves it: ``y = W x + b + s (w1 ⊗ w2) x``, a Kronecker product of two small matrices.

``w1`` [L, M] and ``w2`` [K, N] are in the file as they are or as two factors of rank r, with out = L K and
in = M N; the tensors themselves say which. ``s`` is ``alpha / r`` even where neither matrix is factored: then
the rank shows nowhere and is the config's.

Legend: T tokens, I in features, O out features, R rank; L, M, K, N as above.

Paper: arXiv 2309.14859 (LyCORIS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.lycoris import (
    LycorisConfig,
    Patterns,
    lycoris_options,
    read_lycoris_config,
    reference_scale,
)
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.program import AdapterProgram, Kronecker
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"})


class LokrConfig(LycorisConfig):
    """The fields that matter at inference. How the sizes were split shows in the tensors."""

    inert = LycorisConfig.inert | {"decompose_both", "decompose_factor", "rank_dropout_scale"}


class Lokr(Method[LokrConfig]):
    name = "lokr"
    paper = "arXiv 2309.14859"
    stored = "w1 [l, m] and w2 [k, n], each whole or as two factors of rank r; out = l k, in = m n"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LOKR"

    def parse(self, raw_config: Mapping[str, Any]) -> LokrConfig:
        return read_lycoris_config(LokrConfig, raw_config)

    def compile(self, config: LokrConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        patterns = Patterns(config)
        return AdapterProgram(
            {
                found.site.path: (_part(config, patterns, found),)
                for found in tensors_by_site(tensors, sites, KEYS)
            }
        )

    def reference(self, config: LokrConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        adapted_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            w1_LM, w2_KN = (
                own[key] if key in own else own[f"{key}_a"] @ own[f"{key}_b"]
                for key in ("lokr_w1", "lokr_w2")
            )
            adapted_OI = adapted_OI + reference_scale(config, site) * torch.kron(w1_LM, w2_KN)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, other_r = 1, whole_number(2, 3, generator)
        tensors, ranks = {}, {}
        for number, site in enumerate(chosen):
            rank = other_r if number % 3 == 1 else r
            if rank != r:
                ranks[site.path] = rank
            sizes = zip(_split(site.out_features), _split(site.in_features), strict=True)
            for key, (rows, columns) in zip(("lokr_w1", "lokr_w2"), sizes, strict=True):
                name = f"{PREFIX}{site.path}.{key}"
                if coin(generator):
                    tensors[name] = 2 * random_tensor((rows, columns), generator)
                else:
                    tensors[f"{name}_a"] = 2 * random_tensor((rows, rank), generator)
                    tensors[f"{name}_b"] = random_tensor((rank, columns), generator)
        alphas = {chosen[0].path: 3, chosen[-1].path.split(".")[-1]: 2.5}
        options = lycoris_options(r, whole_number(1, 8, generator), ranks, alphas)
        more = {"decompose_both": True, "decompose_factor": -1, "rank_dropout_scale": False}
        return peft_file("LOKR", chosen, options | more), tensors


def _split(size: int) -> tuple[int, int]:
    small = max(divisor for divisor in range(1, size + 1) if size % divisor == 0 and divisor**2 <= size)
    return small, size // small


def _part(config: LokrConfig, patterns: Patterns, found: SiteTensors) -> Kronecker:
    site = found.site
    w1 = _factors(config, found, "lokr_w1", ("l", "m"))
    rows, columns = w1[0].shape[0], w1[-1].shape[1]
    if site.out_features % rows or site.in_features % columns:
        raise InvalidTensors(
            f"{found.name_of('lokr_w1')}: found shape [{rows}, {columns}], "
            f"expected divisors of [{site.out_features}, {site.in_features}]"
        )
    k, n = site.out_features // rows, site.in_features // columns
    w2 = _factors(config, found, "lokr_w2", (k, n))
    rank = next((factors[0].shape[1] for factors in (w1, w2) if len(factors) == 2), patterns.rank(site.path))
    w1_LM = _product(w1) * patterns.scale(site.path, rank)
    if len(w2) == 1 or k * n <= w2[0].shape[1] * (k + n):
        return Kronecker(w1_LM, _product(w2))
    left_KR, right_RN = w2
    return Kronecker(w1_LM, left_KR.to(torch.float32, copy=True), right_RN.to(torch.float32, copy=True))


def _factors(
    config: LokrConfig, found: SiteTensors, key: str, shape: tuple[int | str, int | str]
) -> tuple[Tensor, ...]:
    """One matrix, or the two whose product it is, checked against each other and the config."""
    halves = [name for name in (f"{key}_a", f"{key}_b") if name in found.tensors]
    if not halves:
        return (found.need(key, shape),)
    if key in found.tensors:
        raise InvalidTensors(f"{found.name_of(halves[0])} is surplus: the file holds {key} itself too")
    left = found.need(f"{key}_a", (shape[0], "r"))
    rank = left.shape[1]
    check_rank(found, f"{key}_a", rank, config.r, config.rank_pattern)
    return left, found.need(f"{key}_b", (rank, shape[1]))


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """The matrix in float32, in memory of its own."""
    if len(factors) == 1:
        return factors[0].to(torch.float32, copy=True)
    return factors[0].to(torch.float32) @ factors[1].to(torch.float32)
