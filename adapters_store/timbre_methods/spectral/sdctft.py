"""sDCTFT (MaCP): ``y = (W + scale T_Oᵀ S T_I) x + b`` with K coefficients at places that the file names.

The paper's transform is the orthonormal DCT-II; public code also has two others, so the config says which::

    dct2-ortho   T[v, p] = cos(π v (2p + 1) / 2n) √(2 / n), divided by √2 for v = 0
    dct2-raw     T[v, p] = cos(π v (2p + 1) / 2n) / n, divided by 2 for v = 0: a DCT without normalisation
    hartley      T[v, p] = (cos + sin)(2π v p / n) / n

``transpose`` says that places are (column, row). In which bands places were chosen is a matter of training.
Equal places add. Formats: ``adapters_store/FORMAT.md``.

Legend: T tokens, I in features, O out features, N stored coefficients, n one of I and O.

Papers: arXiv 2410.09103 and arXiv 2505.23870.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Places, Spectral
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

COEFFICIENTS, INDICES = "sdctft_coefficients", "sdctft_indices"
KEYS = frozenset({COEFFICIENTS, INDICES})
TRANSFORMS = ("dct2-ortho", "dct2-raw", "hartley")


class SdctftConfig(PeftConfig):
    transform: Literal["dct2-ortho", "dct2-raw", "hartley"]
    scale: Finite
    transpose: bool = False


class Sdctft(Method[SdctftConfig]):
    name = "sdctft"
    paper = "arXiv 2410.09103"
    stored = "n coefficients, their rows and columns"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SDCTFT"

    def parse(self, raw_config: Mapping[str, Any]) -> SdctftConfig:
        return read_config(SdctftConfig, raw_config)

    def compile(self, config: SdctftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: SdctftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            _, rows_N, columns_N = _read(config, found)
            check_places(found, INDICES, rows_N, columns_N)

    def reference(self, config: SdctftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            shape = (site.in_features, site.out_features) if config.transpose else weight_OI.shape
            spectrum = torch.zeros(shape, dtype=x_TI.dtype)
            values = own[COEFFICIENTS].to(x_TI.dtype)
            spectrum.index_put_(tuple(own[INDICES].long()), values, accumulate=True)
            left, right = (_matrix(config.transform, n, x_TI.dtype) for n in shape)
            delta = config.scale * (left.T @ spectrum @ right)
            weight_OI = weight_OI + (delta.T if config.transpose else delta)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        options = {
            "transform": TRANSFORMS[whole_number(0, 2, generator)],
            "scale": 20.0 + whole_number(0, 20, generator),
            "transpose": coin(generator),
        }
        tensors = {}
        for site in chosen:
            count = whole_number(1, 12, generator)
            sizes = [site.out_features, site.in_features]
            indices = [
                torch.randint(0, size, (count,), generator=generator)
                for size in (reversed(sizes) if options["transpose"] else sizes)
            ]
            tensors[f"{PREFIX}{site.path}.{COEFFICIENTS}"] = random_tensor((count,), generator)
            tensors[f"{PREFIX}{site.path}.{INDICES}"] = torch.stack(indices).to(torch.int32)
        return peft_file("SDCTFT", chosen, options), tensors


def check_places(found: SiteTensors, key: str, rows_N: Tensor, columns_N: Tensor) -> None:
    """Raises `InvalidTensors` for a place outside the layer's [O, I]."""
    sizes = (("row", rows_N, found.site.out_features), ("column", columns_N, found.site.in_features))
    for what, index_N, size in sizes:
        wrong_N = index_N[(index_N < 0) | (index_N >= size)]
        if wrong_N.numel():
            raise InvalidTensors(
                f"{found.name_of(key)}: found the {what} {int(wrong_N[0])}, expected 0 to {size - 1}"
            )


def _read(config: SdctftConfig, found: SiteTensors) -> tuple[Tensor, Tensor, Tensor]:
    """The coefficients, rows and columns, copied."""
    c_N = found.need(COEFFICIENTS, ("n",)).to(torch.float32, copy=True)
    indices = found.need(INDICES, (2, c_N.numel()), (torch.int32, torch.int64))
    first_N, second_N = (index_N.to(torch.int64, copy=True) for index_N in indices)
    return (c_N, second_N, first_N) if config.transpose else (c_N, first_N, second_N)


def _part(config: SdctftConfig, found: SiteTensors) -> Spectral:
    c_N, rows_N, columns_N = _read(config, found)
    site = found.site
    c_N *= config.scale
    for index_N, n in ((rows_N, site.out_features), (columns_N, site.in_features)):
        # Of the orthonormal transform, as large as the file's.
        if config.transform == "hartley":
            c_N /= math.sqrt(n)
        elif config.transform == "dct2-raw":
            c_N *= torch.where(index_N == 0, 0.5, math.sqrt(0.5)) / math.sqrt(n)
    transform: Literal["hartley", "dct"] = "hartley" if config.transform == "hartley" else "dct"
    places = Places(transform, site.out_features, site.in_features, rows_N, columns_N, is_own=True)
    return Spectral(c_N, places)


def _matrix(transform: str, n: int, dtype: torch.dtype) -> Tensor:
    """T [n, n] by its formula."""
    v, p = torch.arange(n).unsqueeze(1), torch.arange(n)
    if transform == "hartley":
        angle = 2 * math.pi * (v * p % n).to(dtype) / n
        return (angle.cos() + angle.sin()) / n
    matrix = (math.pi * (v * (2 * p + 1) % (4 * n)).to(dtype) / (2 * n)).cos()
    if transform == "dct2-ortho":
        return matrix * torch.where(v == 0, math.sqrt(1 / n), math.sqrt(2 / n)).to(dtype)
    return matrix * torch.where(v == 0, 1 / (2 * n), 1 / n).to(dtype)
