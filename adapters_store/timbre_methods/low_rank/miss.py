"""MiSS, as PEFT saves it, and its older name BONE: shards of the weight that share one small block.

``init_weights`` names the formula, ``D`` being the file's only tensor:

* true, false: ``y = W x + b + Dᵀ fold(x)``, D [r, out], where fold adds up the pieces of length r of x, the
  last one filled up with zeros;
* ``"mini"``: the same with D [r, mini_r] repeated along the outputs;
* ``"bat"``: each tile [r, r] of W, ``W_ij``, becomes ``W_ij + W_ij D_i + D_i``, D [out / r, r, r].

Where r divides the input the fold is a Kronecker product with ones, ``ΔW = 1 ⊗ Dᵀ``; else it is a matrix of
zeros and ones, and ΔW low-rank. The smallest of these and ΔW itself is kept. ``bat`` has full rank.

Legend: T tokens, I in features, O out features, R rank, Q outputs with a column of D of their own, N tiles.

Paper: arXiv 2409.15371.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense, Kronecker, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY_OF = {"MISS": "miss_block", "BONE": "bone_block"}


class MissConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"miss_dropout"})

    peft_type: Literal["MISS", "BONE"]
    r: Rank = 64
    mini_r: Rank = 1
    init_weights: bool | Literal["bat", "mini"] = True

    @property
    def key(self) -> str:
        return KEY_OF[self.peft_type]


class Miss(Method[MissConfig]):
    name = "miss"
    paper = "arXiv 2409.15371"
    stored = "a block: [r, out], [r, mini_r] or [out / r, r, r]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") in KEY_OF

    def parse(self, raw_config: Mapping[str, Any]) -> MissConfig:
        config = read_config(MissConfig, raw_config)
        if config.peft_type == "BONE" and config.init_weights == "mini":
            raise InvalidConfig("adapter_config.json: init_weights: BONE has no 'mini', found 'mini'")
        return config

    def compile(self, config: MissConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        part_of = _tiles if config.init_weights == "bat" else _fold
        keys = frozenset({config.key})
        return AdapterProgram(
            {found.site.path: (part_of(config, found),) for found in tensors_by_site(tensors, sites, keys)}
        )

    def reference(self, config: MissConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        adapted_OI = site.weight_OI.to(x_TI.dtype).clone()
        for block in tensors_of_site(tensors, site, frozenset({config.key})).values():
            d, r = block.to(x_TI.dtype), config.r
            if config.init_weights == "bat":
                for i, rows in enumerate(torch.split(adapted_OI, r)):
                    for tile in torch.split(rows, r, dim=1):
                        tile += tile @ d[i] + d[i]
            else:
                d_RO = d.repeat(1, site.out_features // d.shape[1])
                for column in range(site.in_features):
                    adapted_OI[:, column] += d_RO[column % r]
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kind = (True, False, "mini", "bat")[whole_number(0, 3, generator)]
        r, mini_r = whole_number(2, 5, generator), 1
        fitting = dict(sites)
        if kind == "bat":
            r = whole_number(1, 3, generator)
            fitting = {
                path: site
                for path, site in sites.items()
                if not (site.in_features % r or site.out_features % r)
            }
        if kind == "mini":
            mini_r = whole_number(1, 3, generator)
            fitting = {path: site for path, site in sites.items() if site.out_features % mini_r == 0}
        if not fitting:
            kind, fitting = True, dict(sites)
        peft_type = "BONE" if kind != "mini" and coin(generator) else "MISS"
        chosen = chosen_sites(fitting, generator)
        tensors = {}
        for site in chosen:
            shape: tuple[int, ...] = (r, mini_r if kind == "mini" else site.out_features)
            if kind == "bat":
                shape = (site.out_features // r, r, r)
            tensors[f"{PREFIX}{site.path}.{KEY_OF[peft_type]}"] = random_tensor(shape, generator)
        options: dict[str, Any] = {"r": r, "init_weights": kind, "bias": "none", "modules_to_save": None}
        if peft_type == "MISS":
            options |= {"mini_r": mini_r, "miss_dropout": 0.0}
        return peft_file(peft_type, chosen, options), tensors


def _fold(config: MissConfig, found: SiteTensors) -> Part:
    site, r = found.site, config.r
    own = config.mini_r if config.init_weights == "mini" else site.out_features
    d_RQ = found.need(config.key, (r, own)).to(torch.float32)
    if site.out_features % own or r > site.in_features:
        raise InvalidTensors(
            f"{found.name_of(config.key)}: found shape [{r}, {own}], "
            f"expected at most {site.in_features} rows and a divisor of {site.out_features} columns"
        )
    d_QR = d_RQ.T.clone(memory_format=torch.contiguous_format)
    shape = (site.out_features // own, site.in_features // r)
    sizes: dict[str, float] = {
        "kronecker": shape[0] * shape[1] + d_QR.numel() if site.in_features % r == 0 else float("inf"),
        "low rank": r * (site.in_features + site.out_features),
        "dense": site.in_features * site.out_features,
    }
    smallest = min(sizes, key=lambda form: sizes[form])
    if smallest == "kronecker":
        return Kronecker(w1_LM=d_QR.new_ones(shape), w2_KR=d_QR)
    b_OR = d_QR.repeat(shape[0], 1)
    pieces = -(-site.in_features // r)
    if smallest == "low rank":
        a_RI = torch.eye(r, device=d_QR.device).repeat(1, pieces)[:, : site.in_features]
        return LowRank(a_RI=a_RI.contiguous(), b_OR=b_OR)
    return Dense(b_OR.repeat(1, pieces)[:, : site.in_features].contiguous())


def _tiles(config: MissConfig, found: SiteTensors) -> Dense:
    site, r = found.site, config.r
    if site.in_features % r or site.out_features % r:
        raise InvalidTensors(
            f"{found.name_of(config.key)}: found a layer of {site.out_features} x {site.in_features}, "
            f"expected multiples of r={r}"
        )
    tiles = site.out_features // r
    d_NRR = found.need(config.key, (tiles, r, r)).to(torch.float32)
    w_NXR = site.weight_OI.to(d_NRR.device, torch.float32).reshape(tiles, -1, r)
    delta_NRXR = (w_NXR @ d_NRR).view(tiles, r, -1, r).add_(d_NRR[:, :, None])
    return Dense(delta_NRXR.view(site.out_features, site.in_features))
