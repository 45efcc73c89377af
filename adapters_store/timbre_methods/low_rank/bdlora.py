"""BD-LoRA, as PEFT saves it: LoRA in which A or B is block-diagonal, ``y = W x + b + s B A x``.

N blocks on the diagonal are stored one below the other: A as [r, in / N] or B as [out, r / N]. The shapes say
which of the two it is; a layer may also have neither. Served as the plain LoRA that it is, zeros written out.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2510.23346.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, is_on
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import coin
from timbre_methods.low_rank.lora import (
    LINEAR_KEYS,
    VARIANTS,
    LoraConfig,
    bias_parts,
    lora_example,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import SiteTensors, tensors_by_site, tensors_of_site


class Blocks(PeftConfig):
    """Where training made blocks is seen from the shapes; how many must be told."""

    nblocks: int = Field(default=1, ge=1, le=4096)
    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    match_strict: bool = True


class BdloraConfig(LoraConfig):
    use_bdlora: Blocks


class Bdlora(Method[BdloraConfig]):
    name = "bdlora"
    paper = "arXiv 2510.23346"
    stored = "A [r, in / N] or B [out, r / N], the other whole"
    checked_against = "PEFT"
    may_be_stacked = True

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        switches = {switch for switch in VARIANTS if is_on(raw_config.get(switch))}
        return raw_config.get("peft_type") == "LORA" and switches == {"use_bdlora"}

    def parse(self, raw_config: Mapping[str, Any]) -> BdloraConfig:
        return read_lora_config(BdloraConfig, raw_config)

    def compile(self, config: BdloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        parts = {}
        for found in tensors_by_site(tensors, sites, LINEAR_KEYS):
            a_RI, b_OR = _factors(config, found)
            s = scale(config, alphas, found.site.path, a_RI.shape[0])
            parts[found.site.path] = (LowRank(a_RI, b_OR * s), *bias_parts(config, found, s))
        return AdapterProgram(parts)

    def reference(self, config: BdloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, LINEAR_KEYS).items()}
        if own:
            rank, count = own["lora_A.weight"].shape[0], config.use_bdlora.nblocks
            z_TR = _by_block(own["lora_A.weight"], x_TI, count)
            s = reference_scale(config, site, rank)
            change_TO = s * (_by_block(own["lora_B.weight"], z_TR, count) + own.get("lora_B.bias", 0))
        else:
            change_TO = torch.zeros(len(x_TI), site.out_features, dtype=x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O) + change_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Two blocks where sizes allow; odd ones stay whole."""
        raw_config, tensors = lora_example(sites, generator, with_bias=coin(generator))
        raw_config |= {"r": 4, "rank_pattern": {}}
        raw_config["use_bdlora"] = {
            "target_modules_bd_a": ["q_proj"], "target_modules_bd_b": [], "nblocks": 2, "match_strict": False
        }  # fmt: skip
        for stem in [
            name.removesuffix("lora_A.weight") for name in tensors if name.endswith("lora_A.weight")
        ]:
            a_RI, b_OR = tensors[stem + "lora_A.weight"], tensors[stem + "lora_B.weight"]
            a_RI, b_OR = a_RI.repeat(4, 1)[:4], b_OR.repeat(1, 4)[:, :4]
            if coin(generator) and a_RI.shape[1] % 2 == 0:
                a_RI = a_RI[:, : a_RI.shape[1] // 2]
            elif b_OR.shape[0] % 2 == 0:
                b_OR = b_OR[:, :2]
            tensors[stem + "lora_A.weight"] = a_RI + torch.rand(a_RI.shape, generator=generator)
            tensors[stem + "lora_B.weight"] = b_OR + torch.rand(b_OR.shape, generator=generator)
        return raw_config, tensors


def _factors(config: BdloraConfig, found: SiteTensors) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] whole, float32."""
    site, count = found.site, config.use_bdlora.nblocks
    a_key, b_key = "lora_A.weight", "lora_B.weight"
    a_RC, b_OC = found.need(a_key, ("r", "in")), found.need(b_key, (site.out_features, "r"))
    rank = a_RC.shape[0]
    check_rank(found, a_key, rank, config.r, config.rank_pattern)
    a_RI = _whole(a_RC, site.in_features, count, found.name_of(a_key))
    b_OR = _whole(b_OC, rank, count, found.name_of(b_key))
    return a_RI, b_OR


def _whole(stored: Tensor, columns: int, count: int, name: str) -> Tensor:
    """A copy with all its columns: the blocks, if it is made of them, along the diagonal."""
    rows, width = stored.shape
    if width == columns:
        return stored.to(torch.float32, copy=True)
    if width * count != columns or rows % count:
        raise InvalidTensors(
            f"{name}: found shape {[rows, width]}, expected [{rows}, {columns}], "
            f"or {count} blocks of [{rows} / {count}, {columns} / {count}] one below the other"
        )
    whole: Tensor = torch.block_diag(*stored.to(torch.float32).chunk(count))  # type: ignore[no-untyped-call]
    return whole


def _by_block(stored: Tensor, x_TC: Tensor, count: int) -> Tensor:
    """The product, block by block where the columns do not reach."""
    if stored.shape[1] == x_TC.shape[1]:
        return x_TC @ stored.T
    pieces = zip(stored.chunk(count), x_TC.chunk(count, dim=1), strict=True)
    return torch.cat([x @ block.T for block, x in pieces], dim=1)
