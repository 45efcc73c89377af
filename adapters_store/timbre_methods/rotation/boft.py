"""BOFT, as PEFT saves it: an input rotated by butterfly factors, and a scale on the output.

``y = s ∘ (W (R x)) + b``: the base's bias is not scaled. Each of the m stored factors gives blocks
``Q = (I − S)(I + S)⁻¹`` with ``S = (D − Dᵀ) / 2``. PEFT multiplies rows, ``x R_last … R_0``, so the blocks of
our columns are its blocks transposed, and the last factor acts first. Factor i couples the halves of chunks
of ``b · 2^i`` entries.

A file has m = 1 factors, whatever its config says, where PEFT had no compiled extension to train more.

Legend: T tokens, I in features, O out features, F factors, S blocks, B their size.

Paper: arXiv 2311.06243.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Rotation
from timbre_methods.rotation.cayley import cayley
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

ROTATION = "boft_R"
SCALE = "boft_s"
KEYS = frozenset({ROTATION, SCALE})


class BoftConfig(PeftConfig):
    """Sizes of 0 follow from the other one; both are checked against the tensors."""

    inert = frozenset({"boft_dropout", "init_weights"})

    boft_block_size: Annotated[int, Field(ge=0, le=2**31 - 1)] = 4
    boft_block_num: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    boft_n_butterfly_factor: Annotated[int, Field(ge=1, le=31)] = 1


class Boft(Method[BoftConfig]):
    name = "boft"
    paper = "arXiv 2311.06243"
    stored = "m factors of blocks of the input [m, in / b, b, b], scale [out]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "BOFT"

    def parse(self, raw_config: Mapping[str, Any]) -> BoftConfig:
        config = read_config(BoftConfig, raw_config)
        if (config.boft_block_size == 0) == (config.boft_block_num == 0):
            raise InvalidConfig(
                f"BOFT: found boft_block_size={config.boft_block_size} and boft_block_num="
                f"{config.boft_block_num}, expected one of them to be 0"
            )
        return config

    def compile(self, config: BoftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_rotation(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: BoftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            _rotation(config, found)

    def reference(self, config: BoftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        weight_OI = site.weight_OI.to(x_TI.dtype)
        if own:
            rotation_II = torch.eye(site.in_features, dtype=x_TI.dtype)
            for number, factor_SBB in enumerate(own[ROTATION]):
                rotation_II = _reference_factor(factor_SBB, number) @ rotation_II
            weight_OI = own[SCALE] * torch.einsum("oi,ji->oj", weight_OI, rotation_II)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        features = chosen[0].in_features
        chosen = [site for site in chosen if site.in_features == features]
        sizes = [size for size in range(2, features + 1) if features % size == 0]
        size = sizes[whole_number(0, len(sizes) - 1, generator)]
        factors = whole_number(1, 3, generator)
        while factors > 1 and (size % 2 or features % (size << (factors - 1))):
            factors -= 1
        by_number, tensors = coin(generator), {}
        for site in chosen:
            stem = f"{PREFIX}{site.path}"
            shape = (factors, features // size, size, size)
            tensors[f"{stem}.{ROTATION}"] = random_tensor(shape, generator)
            tensors[f"{stem}.{SCALE}"] = 1 + random_tensor((site.out_features, 1), generator)
        options = {
            "bias": "none",
            "boft_block_num": features // size if by_number else 0,
            "boft_block_size": 0 if by_number else size,
            "boft_dropout": 0.0,
            "boft_n_butterfly_factor": factors,
            "init_weights": True,
        }
        return peft_file("BOFT", chosen, options), tensors


def _rotation(config: BoftConfig, found: SiteTensors) -> Rotation:
    size = _block_size(config, found)
    free_FSBB = found.need(ROTATION, ("factors", found.site.in_features // size, size, size))
    free_FSBB = free_FSBB.to(torch.float32)
    scale_O1 = found.need(SCALE, (found.site.out_features, 1)).to(torch.float32, copy=True)
    factors = len(free_FSBB)
    if factors not in (1, config.boft_n_butterfly_factor):
        raise InvalidTensors(
            f"{found.name_of(ROTATION)}: found {factors} factors, "
            f"expected 1 or the config's {config.boft_n_butterfly_factor}"
        )
    if factors > 1 and (size % 2 or found.site.in_features % (size << (factors - 1))):
        raise InvalidTensors(
            f"{found.name_of(ROTATION)}: found {factors} factors of blocks of {size}, expected an even size "
            f"of which 2^{factors - 1} times divides the {found.site.in_features} inputs"
        )
    skew_FSBB = (free_FSBB - free_FSBB.transpose(2, 3)) / 2
    turned_FSBB = cayley(skew_FSBB.flatten(0, 1), found.name_of(ROTATION)).view_as(skew_FSBB)
    chunks = tuple(size << number for number in reversed(range(factors)))
    return Rotation("input", turned_FSBB.transpose(2, 3).flip(0), chunks, scale_O1.flatten())


def _block_size(config: BoftConfig, found: SiteTensors) -> int:
    """The size that PEFT would give this layer's blocks."""
    features = found.site.in_features
    given = config.boft_block_size or config.boft_block_num
    if features % given:
        raise InvalidTensors(
            f"{found.site.path}: found {features} inputs, expected a multiple of the config's "
            f"boft_block_size {config.boft_block_size} or boft_block_num {config.boft_block_num}"
        )
    return config.boft_block_size or features // config.boft_block_num


def _reference_factor(free_SBB: Tensor, number: int) -> Tensor:
    """One factor as PEFT's rows meet it: ``P blockdiag(Q) Pᵀ``."""
    stored, size, _ = free_SBB.shape
    features, half, chunk = stored * size, size // 2, size * 2**number
    order = list(range(features))
    if number > 0:
        order = []
        for start in range(0, features, chunk):
            pieces = [range(start + at, start + at + half) for at in range(0, chunk, half)]
            order += [place for piece in pieces[0::2] + pieces[1::2] for place in piece]
    eye_BB = torch.eye(size, dtype=free_SBB.dtype)
    blocks_II = torch.zeros(features, features, dtype=free_SBB.dtype)
    for n, free_BB in enumerate(free_SBB):
        skew_BB = 0.5 * (free_BB - free_BB.T)
        place = slice(n * size, (n + 1) * size)
        blocks_II[place, place] = (eye_BB - skew_BB) @ torch.linalg.inv(eye_BB + skew_BB)
    permutation_II = torch.eye(features, dtype=free_SBB.dtype)[order]
    return permutation_II @ blocks_II @ permutation_II.T
