"""OFT, as PEFT saves it: an input that is rotated, block by block, before the base's product.

``y = W (R x) + b``, R block-diagonal. PEFT multiplies rows, ``x_n R_n``, so the blocks of our columns are
its blocks transposed. ``R_n`` comes from a skew-symmetric Q_n, of which the file holds the entries above the
diagonal, row by row:

    use_cayley_neumann        I + 2Q + 2Q² + … + Q^(t−1), t terms
    without it                (I − Q)(I + Q)⁻¹, which turns the other way
    coft                      Q no longer than eps / sqrt(stored blocks), by Frobenius
    block_share               one block for all

On an embedding it is what was looked up that is rotated: ``y = R (W x)``, with blocks of the output.

Legend: T tokens, I in features, O out features, N stored blocks, B their size, E entries above the diagonal.

Paper: arXiv 2306.07280; the series: 2506.19847.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Rotation
from timbre_methods.rotation.cayley import cayley, cayley_series
from timbre_methods.site_tensors import PREFIX, SiteTensors, article, tensors_by_site, tensors_of_site

KEY = "oft_R.weight"
EMBEDDING_KEY = "oft_embedding_R.weight"
KEYS = frozenset({KEY, EMBEDDING_KEY})
FIRST_VERSION_OF_THE_SERIES = (0, 18)


class OftConfig(PeftConfig):
    """The fields that shape R. The size of the blocks is the tensors' own: PEFT adjusts it to each layer."""

    inert = frozenset({"init_weights", "module_dropout", "oft_block_size", "r"})

    coft: bool = False
    eps: Finite = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Field(ge=1, le=100)] = 5


class Oft(Method[OftConfig]):
    name = "oft"
    paper = "arXiv 2306.07280"
    stored = "skew-symmetric blocks of the input, an embedding's output, [in / b, b (b - 1) / 2]"
    checked_against = "PEFT"
    kinds = frozenset({"linear", "embedding"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "OFT"

    def parse(self, raw_config: Mapping[str, Any]) -> OftConfig:
        config = read_config(OftConfig, raw_config)
        version = raw_config.get("peft_version")
        if config.use_cayley_neumann and not _has_the_series(version):
            raise UnsupportedMethod(
                f"OFT with use_cayley_neumann saved by PEFT {shown(version)} is not served: before 0.18 the "
                "series was another one; train with a newer PEFT, or with use_cayley_neumann=false"
            )
        return config

    def compile(self, config: OftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_rotation(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: OftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            _rotation(config, found)

    def reference(self, config: OftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = tensors_of_site(tensors, site, KEYS)
        rotation_DD = torch.eye(_turned_features(site), dtype=x_TI.dtype)
        if own:
            entries_NE = own[key_of(site)].to(x_TI.dtype)
            stored = [_reference_block(config, row, len(entries_NE)) for row in entries_NE]
            size = len(stored[0])
            for n in range(len(rotation_DD) // size):
                place = slice(n * size, (n + 1) * size)
                rotation_DD[place, place] = stored[0 if config.block_share else n]
        if site.kind == "embedding":
            return x_TI @ site.weight_OI.to(x_TI.dtype).T @ rotation_DD
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI @ rotation_DD, site.weight_OI.to(x_TI.dtype), bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        options = {
            "bias": "none",
            "block_share": coin(generator),
            "coft": coin(generator),
            "eps": 0.5,
            "init_weights": True,
            "module_dropout": 0.0,
            "num_cayley_neumann_terms": whole_number(2, 7, generator),
            "oft_block_size": 4,
            "r": 0,
            "use_cayley_neumann": coin(generator),
        }
        tensors = {}
        for site in chosen:
            features = _turned_features(site)
            sizes = [b for b in range(2, features + 1) if features % b == 0]
            size = sizes[whole_number(0, len(sizes) - 1, generator)]
            count = 1 if options["block_share"] else features // size
            entries_NE = random_tensor((count, size * (size - 1) // 2), generator) * 0.6
            entries_NE[0] *= 0.02 / entries_NE[0].norm() if options["coft"] else 1.0
            tensors[f"{PREFIX}{site.path}.{key_of(site)}"] = entries_NE
        return peft_file("OFT", chosen, options), tensors


def key_of(site: Site) -> str:
    """On an embedding the blocks have a name of their own."""
    return EMBEDDING_KEY if site.kind == "embedding" else KEY


def _turned_features(site: Site) -> int:
    return site.out_features if site.kind == "embedding" else site.in_features


def _has_the_series(version: object) -> bool:
    numbers = re.match(r"(\d{1,6})\.(\d{1,6})", version) if isinstance(version, str) else None
    if numbers is None or str(version).startswith("0.18.0.dev"):
        return False
    return (int(numbers[1]), int(numbers[2])) >= FIRST_VERSION_OF_THE_SERIES


def _rotation(config: OftConfig, found: SiteTensors) -> Rotation:
    key = key_of(found.site)
    stray = next((other for other in found.tensors if other != key), None)
    if stray is not None:
        raise InvalidTensors(f"{found.name_of(stray)} is surplus: {article(found.site)} has {key}")
    entries_NE = found.need(key, ("blocks", "entries")).to(torch.float32)
    stored, entries = entries_NE.shape
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    features = _turned_features(found.site)
    expected = 1 if config.block_share else features // size
    if size * (size - 1) != 2 * entries or features % size or stored != expected:
        raise InvalidTensors(
            f"{found.name_of(key)}: found shape {[stored, entries]}, expected [blocks, b (b - 1) / 2] with "
            f"blocks of a size b that divides {features}, "
            + ("shared by all" if config.block_share else "each")
        )
    skew_NBB = _skew(entries_NE, size)
    if config.coft:
        skew_NBB = _shrunk(skew_NBB, config.eps / math.sqrt(stored))
    turned_NBB = (
        cayley_series(skew_NBB, config.num_cayley_neumann_terms)
        if config.use_cayley_neumann
        else cayley(skew_NBB, found.name_of(key))
    )
    side: Literal["input", "output"] = "output" if found.site.kind == "embedding" else "input"
    return Rotation(side, turned_NBB.transpose(1, 2).unsqueeze(0).contiguous(), (size,))


def _skew(entries_NE: Tensor, size: int) -> Tensor:
    rows_E, columns_E = torch.triu_indices(size, size, 1, device=entries_NE.device)
    upper_NBB = entries_NE.new_zeros(len(entries_NE), size, size)
    upper_NBB[:, rows_E, columns_E] = entries_NE
    return upper_NBB - upper_NBB.transpose(1, 2)


def _shrunk(skew_NBB: Tensor, longest: float) -> Tensor:
    """Each matrix, made ``longest`` where its Frobenius norm is larger."""
    length_N11 = torch.linalg.matrix_norm(skew_NBB, keepdim=True)
    return torch.where(length_N11 <= longest, skew_NBB, skew_NBB * (longest / length_N11))


def _reference_block(config: OftConfig, entries_E: Tensor, stored: int) -> Tensor:
    """One block as PEFT's rows meet it, entry by entry and power by power."""
    size = round(0.5 + math.sqrt(0.25 + 2 * len(entries_E)))
    skew_BB = torch.zeros(size, size, dtype=entries_E.dtype)
    places = [(i, j) for i in range(size) for j in range(i + 1, size)]
    for (i, j), entry in zip(places, entries_E, strict=True):
        skew_BB[i, j], skew_BB[j, i] = entry, -entry
    if config.coft:
        longest, length = config.eps / math.sqrt(stored), float(skew_BB.square().sum().sqrt())
        skew_BB = skew_BB * (longest / length if length > longest else 1.0)
    block_BB = torch.eye(size, dtype=entries_E.dtype)
    if not config.use_cayley_neumann:
        inverse_BB: Tensor = torch.linalg.inv(block_BB + skew_BB)
        return (block_BB - skew_BB) @ inverse_BB
    terms = config.num_cayley_neumann_terms
    factors = {1: [], 2: [2], 3: [2, 2, 1]}.get(terms, [2] * (terms - 2) + [1])
    for exponent, factor in enumerate(factors, start=1):
        block_BB = block_BB + factor * torch.linalg.matrix_power(skew_BB, exponent)
    return block_BB
