"""DEFT, as PEFT saves it: ``y = (I - Q P₊ᵀ) W x + s Q R x + b``.

A subspace of the outputs is taken out of the base and refilled. ``decomposition_method`` says ``Q = P`` and
``P₊ = max(P, 0)`` ("relu"), or ``Q = P₊`` = the Q of P's QR decomposition ("qr"), which is computed once,
at registration. ``s = alpha / r``, or 1 without alpha; ``para`` leaves R out. The base's bias is untouched.
``s R - P₊ᵀ W`` does not depend on the input, so all of it folds into a LoRA.

Legend: T tokens, I in features, O out features, R rank.

Source: the public code of PEFT, which names no paper; ``para`` is called PaRa there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.base_products import left_product
from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import (
    PREFIX,
    SiteTensors,
    derived_name,
    derived_of_site,
    tensors_by_site,
    tensors_of_site,
)

P, R = "deft_P", "deft_R"
KEYS = frozenset({P, R})
Q = "deft_Q"
"""The derived tensor's key."""


class DeftConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"deft_dropout", "init_scale", "init_weights"})

    r: Rank = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    alpha: Finite | None = None
    para: bool = False


class Deft(Method[DeftConfig]):
    name = "deft"
    paper = "PEFT's DEFT"
    stored = "P [out, r], R [r, in]"
    regenerated = "Q of P's QR decomposition; the input's factor, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "DEFT"

    def parse(self, raw_config: Mapping[str, Any]) -> DeftConfig:
        return read_config(DeftConfig, raw_config)

    def derive(self, config: DeftConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        """Q in float32, as PEFT computes it: R was trained beside these very columns, signs included."""
        if config.decomposition_method != "qr":
            return {}
        return {
            derived_name(found.site.path, Q): torch.linalg.qr(_read_p(config, found)).Q
            for found in tensors_by_site(tensors, sites, KEYS)
        }

    def compile(self, config: DeftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: DeftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            q_OR = p_OR = own[P]
            p_OR = p_OR * (p_OR > 0)
            if config.decomposition_method == "qr":
                q_OR = p_OR = derived_of_site(tensors, site.path)[Q].to(x_TI.dtype)
            kept_OO = torch.eye(site.out_features, dtype=x_TI.dtype) - torch.einsum("or,pr->op", q_OR, p_OR)
            weight_OI = torch.einsum("op,pi->oi", kept_OO, weight_OI)
            if not config.para:
                s = config.alpha / q_OR.shape[1] if config.alpha else 1.0
                weight_OI = weight_OI + s * torch.einsum("or,ri->oi", q_OR, own[R])
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        r, para = whole_number(1, 8, generator), coin(generator)
        tensors = {}
        for site in chosen:
            rank = min(r, site.out_features)
            tensors[f"{PREFIX}{site.path}.{P}"] = random_tensor((site.out_features, rank), generator)
            if not para:
                tensors[f"{PREFIX}{site.path}.{R}"] = random_tensor((rank, site.in_features), generator)
        options = {
            "r": r,
            "decomposition_method": "qr" if coin(generator) else "relu",
            "alpha": whole_number(1, 16, generator) if coin(generator) else None,
            "para": para,
            "deft_dropout": 0.0,
            "init_scale": 1.0,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }
        return peft_file("DEFT", chosen, options), tensors


def _read_p(config: DeftConfig, found: SiteTensors) -> Tensor:
    """P in float32; no layer has more ranks than outputs."""
    out_features = found.site.out_features
    return found.need(P, (out_features, min(config.r, out_features))).to(torch.float32)


def _part(config: DeftConfig, found: SiteTensors) -> LowRank:
    p_OR = _read_p(config, found)
    if config.decomposition_method == "qr":
        b_OR = taken_OR = found.derived[Q].clone()
    else:
        b_OR, taken_OR = p_OR.clone(), torch.relu(p_OR)
    a_RI = left_product(taken_OR.T, found.site.weight_OI).neg_()
    if config.para:
        if R in found.tensors:
            raise InvalidTensors(f"{found.name_of(R)} is surplus: the config says para=true")
        return LowRank(a_RI=a_RI, b_OR=b_OR)
    rank = p_OR.shape[1]
    r_RI = found.need(R, (rank, found.site.in_features)).to(torch.float32)
    return LowRank(a_RI=a_RI.add_(r_RI, alpha=config.alpha / rank if config.alpha else 1.0), b_OR=b_OR)
