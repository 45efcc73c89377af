"""VB-LoRA, as PEFT saves it: LoRA put together from a bank of vectors, ``y = W x + b + B A x``.

Each piece of a row of A, and of a column of B, is the sum of K vectors of the bank with weights that sum
to 1: the softmax of the K largest logits. A file holds all logits, or (``save_only_topk_weights``) the K
places and all weights but the last.

Legend: T tokens, I in features, O out features, R rank, V vectors in the bank, L length of a vector,
K vectors in a sum, N pieces.

Paper: arXiv 2405.15179 equations 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, check_tensor, tensors_by_site, tensors_of_site

BANK = "base_model.vblora_vector_bank"
LOGITS = ("vblora_logits_A", "vblora_logits_B")
INDICES = tuple(f"{key}_topk_indices" for key in LOGITS)
WEIGHTS = tuple(f"{key}_topk_weights" for key in LOGITS)
INTEGERS = (torch.uint8, torch.int16, torch.int32, torch.int64)


class VbloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"})

    r: Rank = 4
    num_vectors: Count = 256
    vector_length: Count = 256
    topk: Annotated[int, Field(ge=1, le=256)] = 2
    save_only_topk_weights: bool = False

    @property
    def keys(self) -> frozenset[str]:
        return frozenset((*INDICES, *WEIGHTS) if self.save_only_topk_weights else LOGITS)


class Vblora(Method[VbloraConfig]):
    name = "vblora"
    paper = "arXiv 2405.15179"
    stored = "a bank of vectors once; logits for each piece of A and B, or the top k places and weights"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "VBLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> VbloraConfig:
        config = read_config(VbloraConfig, raw_config)
        if config.topk > config.num_vectors:
            raise InvalidConfig(
                f"adapter_config.json: topk: found {config.topk}, expected at most num_vectors, "
                f"{config.num_vectors}"
            )
        return config

    def compile(self, config: VbloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        if BANK not in tensors:
            raise InvalidTensors(f"{BANK} is missing")
        check_tensor(BANK, tensors[BANK], (config.num_vectors, config.vector_length))
        bank_VL = tensors[BANK].to(torch.float32)
        by_site = tensors_by_site(tensors, sites, config.keys, beside=(BANK,))
        return AdapterProgram({found.site.path: (_part(config, bank_VL, found),) for found in by_site})

    def check_values(self, config: VbloraConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, config.keys, beside=(BANK,)):
            for key in INDICES if config.save_only_topk_weights else ():
                indices = found.tensors[key].long()
                low, high = (int(value) for value in indices.aminmax())
                if low < 0 or high >= config.num_vectors:
                    raise InvalidTensors(
                        f"{found.name_of(key)}: found places {low} to {high}, "
                        f"expected 0 to {config.num_vectors - 1}"
                    )
                if (indices.sort(dim=-1).values.diff() == 0).any():
                    raise InvalidTensors(
                        f"{found.name_of(key)}: found a vector twice in one sum, expected different ones"
                    )

    def reference(self, config: VbloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, config.keys)
        if own:
            bank_VL = tensors[BANK].to(x_TI.dtype)
            a, b = (_mixture(config, own, side, x_TI.dtype) @ bank_VL for side in (0, 1))
            b_OR = torch.cat([b[n].T for n in range(len(b))])
            weight_OI = weight_OI + torch.einsum("or,ri->oi", b_OR, a.flatten(1))
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        length = math.gcd(*(size for site in chosen for size in site.weight_OI.shape))
        rank, topk, is_short = whole_number(1, 3, generator), whole_number(2, 3, generator), coin(generator)
        num_vectors = 300 if coin(generator) else whole_number(topk, 9, generator)
        tensors = {BANK: random_tensor((num_vectors, length), generator)}
        for site in chosen:
            shapes = (rank, site.in_features // length), (site.out_features // length, rank)
            for side, shape in enumerate(shapes):
                logits = random_tensor((*shape, num_vectors), generator)
                stem = f"{PREFIX}{site.path}."
                if not is_short:
                    tensors[stem + LOGITS[side]] = 2 * logits
                    continue
                largest = logits.topk(topk)
                narrow = torch.uint8 if num_vectors < 256 else torch.int16
                tensors[stem + INDICES[side]] = largest.indices.to(narrow)
                tensors[stem + WEIGHTS[side]] = largest.values.softmax(-1)[..., :-1].contiguous()
        options = {
            "r": rank,
            "num_vectors": num_vectors,
            "vector_length": length,
            "topk": topk,
            "save_only_topk_weights": is_short,
            "vblora_dropout": 0.0,
            "init_logits_std": 0.1,
            "init_vector_bank_bound": 0.02,
            "bias": "none",
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "exclude_modules": None,
        }
        return peft_file("VBLORA", chosen, options), tensors


def _part(config: VbloraConfig, bank_VL: Tensor, found: SiteTensors) -> LowRank:
    site, length = found.site, config.vector_length
    if site.in_features % length or site.out_features % length:
        raise InvalidTensors(
            f"{site.path}: found a layer of {site.out_features} x {site.in_features}, "
            f"expected multiples of the vector length {length}"
        )
    shapes = (config.r, site.in_features // length), (site.out_features // length, config.r)
    a_RNL, b_NRL = (_sums(config, bank_VL, found, side, shape) for side, shape in enumerate(shapes))
    return LowRank(a_RI=a_RNL.flatten(1), b_OR=b_NRL.transpose(1, 2).flatten(0, 1))


def _sums(
    config: VbloraConfig, bank_VL: Tensor, found: SiteTensors, side: int, shape: tuple[int, int]
) -> Tensor:
    """Every piece of one factor, [*shape, L]."""
    if config.save_only_topk_weights:
        indices = found.need(INDICES[side], (*shape, config.topk), INTEGERS).long()
        weights = found.need(WEIGHTS[side], (*shape, config.topk - 1)).to(torch.float32)
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    else:
        logits = found.need(LOGITS[side], (*shape, config.num_vectors)).to(torch.float32)
        largest = logits.topk(config.topk)
        indices, weights = largest.indices, largest.values.softmax(-1)
    pieces = bank_VL.new_zeros(*shape, config.vector_length)
    for k in range(config.topk):
        pieces = pieces.addcmul_(weights[..., k, None], bank_VL[indices[..., k]])
    return pieces


def _mixture(config: VbloraConfig, own: Mapping[str, Tensor], side: int, dtype: torch.dtype) -> Tensor:
    """The weight of every vector of the bank in every piece, mostly zeros."""
    if not config.save_only_topk_weights:
        logits = own[LOGITS[side]].to(dtype)
        least = logits.sort(descending=True).values[..., config.topk - 1, None]
        return logits.masked_fill(logits < least, -math.inf).softmax(-1)
    indices, weights = own[INDICES[side]].long(), own[WEIGHTS[side]].to(dtype)
    mixture = torch.zeros(*indices.shape[:-1], config.num_vectors, dtype=dtype)
    mixture.scatter_(-1, indices[..., :-1], weights)
    return mixture.scatter_(-1, indices[..., -1:], 1 - weights.sum(-1, keepdim=True))
