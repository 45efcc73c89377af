"""GraLoRA, as PEFT saves it: a LoRA for each block of a k x k grid, from one A a column and one B a row.

Input block i gives r numbers, ``z_i = x_i A_i``. They are cut into k pieces, and output block j gets piece
j of every input block, so that ΔW's block (j, i) is ``(A_i[:, piece j] B_j[piece i])ᵀ``, of rank r / k. All
is scaled by ``s = alpha / (r + hybrid_r)``, a plain LoRA of rank ``hybrid_r`` beside it too. In one piece
that is factors of rank k r + hybrid_r, mostly zeros: they are kept while they are smaller than ΔW.

Legend: T tokens, I in features, O out features, K blocks, N = I / K, M = O / K, R rank, P = R / K, H rank
of the plain LoRA.

Paper: arXiv 2505.20355.
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
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.ranks import factors_are_smaller
from timbre_methods.program import AdapterProgram, Dense, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B = "gralora_A", "gralora_B"
A_GENERAL, B_GENERAL = "gralora_A_general.weight", "gralora_B_general.weight"
KEYS = frozenset({A, B, A_GENERAL, B_GENERAL})


class GraloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"gralora_dropout", "init_weights"})

    r: Rank = 32
    hybrid_r: Annotated[int, Field(ge=0, le=4096)] = 0
    alpha: Finite = 64.0
    gralora_k: Rank = 2


class Gralora(Method[GraloraConfig]):
    name = "gralora"
    paper = "arXiv 2505.20355"
    stored = "A [k, in / k, r], B [k, r, out / k]; a LoRA of rank hybrid_r"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "GRALORA"

    def parse(self, raw_config: Mapping[str, Any]) -> GraloraConfig:
        config = read_config(GraloraConfig, raw_config)
        if config.r % config.gralora_k:
            raise InvalidConfig(
                f"adapter_config.json: r: found {config.r}, "
                f"expected a multiple of gralora_k={config.gralora_k}"
            )
        return config

    def compile(self, config: GraloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: GraloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        blocks = range(config.gralora_k)
        pieces = [
            (x_TN @ a_NR).chunk(config.gralora_k, dim=1)
            for x_TN, a_NR in zip(x_TI.chunk(config.gralora_k, dim=1), own[A], strict=True)
        ]
        added_TO = torch.cat(
            [torch.cat([pieces[i][j] for i in blocks], dim=1) @ own[B][j] for j in blocks], dim=1
        )
        if config.hybrid_r:
            added_TO = added_TO + (x_TI @ own[A_GENERAL].T) @ own[B_GENERAL].T
        return y_TO + config.alpha / (config.r + config.hybrid_r) * added_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        k = whole_number(1, 3, generator)
        fitting = {
            path: site for path, site in sites.items() if not (site.in_features % k or site.out_features % k)
        }
        if not fitting:
            k, fitting = 1, dict(sites)
        chosen = chosen_sites(fitting, generator)
        r, hybrid_r = k * whole_number(1, 2, generator), whole_number(0, 2, generator)
        tensors = {}
        for site in chosen:
            shapes: dict[str, tuple[int, ...]] = {
                A: (k, site.in_features // k, r),
                B: (k, r, site.out_features // k),
            }
            if hybrid_r:
                shapes |= {A_GENERAL: (hybrid_r, site.in_features), B_GENERAL: (site.out_features, hybrid_r)}
            for key, shape in shapes.items():
                tensors[f"{PREFIX}{site.path}.{key}"] = 2 * random_tensor(shape, generator)
        options = {
            "r": r,
            "hybrid_r": hybrid_r,
            "alpha": whole_number(2, 8, generator),
            "gralora_k": k,
            "gralora_dropout": 0.1,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }
        return peft_file("GRALORA", chosen, options), tensors


def _part(config: GraloraConfig, found: SiteTensors) -> Part:
    site, k, r = found.site, config.gralora_k, config.r
    if site.in_features % k or site.out_features % k:
        raise InvalidTensors(
            f"{found.name_of(A)}: found a layer of {site.out_features} x {site.in_features}, "
            f"expected multiples of gralora_k={k}"
        )
    a_KNR = found.need(A, (k, site.in_features // k, r)).to(torch.float32)
    b_KRM = found.need(B, (k, r, site.out_features // k)).to(torch.float32)
    general = _general(config, found)
    s = config.alpha / (r + config.hybrid_r)
    if not factors_are_smaller(k * r + config.hybrid_r, site):
        delta_OI = _change(a_KNR, b_KRM)
        if general is not None:
            delta_OI += general.b_OR @ general.a_RI
        return Dense(delta_OI.mul_(s))
    factors = _factors(a_KNR, b_KRM)
    if general is None:
        return LowRank(factors.a_RI, factors.b_OR.mul_(s))
    return LowRank(
        torch.cat([factors.a_RI, general.a_RI]), torch.cat([factors.b_OR, general.b_OR], dim=1).mul_(s)
    )


def _general(config: GraloraConfig, found: SiteTensors) -> LowRank | None:
    """The LoRA beside the blocks, not yet scaled."""
    if not config.hybrid_r:
        surplus = next((key for key in (A_GENERAL, B_GENERAL) if key in found.tensors), None)
        if surplus is not None:
            raise InvalidTensors(f"{found.name_of(surplus)} is surplus: the config says hybrid_r=0")
        return None
    a_HI = found.need(A_GENERAL, (config.hybrid_r, found.site.in_features))
    b_OH = found.need(B_GENERAL, (found.site.out_features, config.hybrid_r))
    return LowRank(a_HI.to(torch.float32), b_OH.to(torch.float32))


def _factors(a_KNR: Tensor, b_KRM: Tensor) -> LowRank:
    """Rank (i, j, p): input block i, its piece j for output block j, place p in the piece."""
    k, n, r = a_KNR.shape
    m, p = b_KRM.shape[2], r // k
    a_KRKN = a_KNR.new_zeros(k, r, k, n)
    a_KRKN.diagonal(dim1=0, dim2=2).copy_(a_KNR.permute(2, 1, 0))
    b_KMKKP = b_KRM.new_zeros(k, m, k, k, p)
    b_KMKKP.diagonal(dim1=0, dim2=3).copy_(b_KRM.view(k, k, p, m).permute(3, 1, 2, 0))
    return LowRank(a_KRKN.view(k * r, k * n), b_KMKKP.view(k * m, k * r))


def _change(a_KNR: Tensor, b_KRM: Tensor) -> Tensor:
    """ΔW [O, I], not yet scaled, block by block: never through the large factors."""
    k, n, r = a_KNR.shape
    b_JIMP = b_KRM.reshape(k, k, r // k, -1).mT
    a_JIPN = a_KNR.reshape(k, n, k, r // k).permute(2, 0, 3, 1)
    return (b_JIMP @ a_JIPN).transpose(1, 2).reshape(-1, k * n)
