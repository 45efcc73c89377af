"""FourierFT, as PEFT saves it: ``y = W x + b + scaling Re(ifft2(S)) x``.

``S`` [O, I] is zero except for N stored reals at places that the file names only by their seed. The places
are drawn again; the number of them is read from the tensor and must be one that the config names.

Legend: T tokens, I in features, O out features, N stored coefficients.

Paper: arXiv 2405.03003 equations 2 to 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, CountPattern, Finite, PeftConfig, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.named_sizes import check_named_size
from timbre_methods.places import fourier_places
from timbre_methods.program import AdapterProgram, Spectral
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY = "fourierft_spectrum"
KEYS = frozenset({KEY})


class FourierftConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights"})

    n_frequency: Count = 1000
    n_frequency_pattern: CountPattern | None = None
    scaling: Finite = 150.0
    random_loc_seed: Seed = 777


def read_spectrum(found: SiteTensors, key: str) -> Tensor:
    """The coefficients of one site, [N]: no more than places."""
    spectrum_N = found.need(key, ("n",))
    (count,) = spectrum_N.shape
    size = found.site.out_features * found.site.in_features
    if count > size:
        raise InvalidTensors(
            f"{found.name_of(key)}: found {count} coefficients for {found.site.out_features} x "
            f"{found.site.in_features} places, expected at most {size}"
        )
    return spectrum_N


class Fourierft(Method[FourierftConfig]):
    name = "fourierft"
    paper = "arXiv 2405.03003"
    stored = "n coefficients"
    regenerated = "places, from the seed"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "FOURIERFT"

    def parse(self, raw_config: Mapping[str, Any]) -> FourierftConfig:
        return read_config(FourierftConfig, raw_config)

    def compile(self, config: FourierftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        scaling = torch.tensor(config.scaling)  # PyTorch multiplies by it in half the time.
        every_site = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({found.site.path: (_part(config, scaling, found),) for found in every_site})

    def reference(self, config: FourierftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            cells = torch.randperm(
                weight_OI.numel(), generator=torch.Generator().manual_seed(config.random_loc_seed)
            )
            spectrum_OI = torch.zeros_like(weight_OI)
            spectrum_OI.view(-1)[cells[: own[KEY].numel()]] = own[KEY].to(x_TI.dtype)
            weight_OI = weight_OI + config.scaling * torch.fft.ifft2(spectrum_OI).real
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        count, other = whole_number(1, 12, generator), whole_number(13, 24, generator)
        counts = {site.path: other for site in chosen[1::3]}
        options = {
            "n_frequency": count,
            "n_frequency_pattern": counts,
            "scaling": 40.0 + whole_number(0, 20, generator),
            "random_loc_seed": whole_number(0, 1000, generator),
            "init_weights": False,
            "bias": "none",
            "modules_to_save": None,
        }
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": random_tensor((counts.get(site.path, count),), generator)
            for site in chosen
        }
        return peft_file("FOURIERFT", chosen, options), tensors


def _part(config: FourierftConfig, scaling: Tensor, found: SiteTensors) -> Spectral:
    spectrum_N = read_spectrum(found, KEY)
    site, count = found.site, spectrum_N.numel()
    words = f"{count} coefficients"
    check_named_size(found, KEY, count, words, config.n_frequency, config.n_frequency_pattern)
    places = fourier_places(
        config.random_loc_seed, site.out_features, site.in_features, count, spectrum_N.device
    )
    return Spectral(c_N=spectrum_N.float() * scaling, places=places)
