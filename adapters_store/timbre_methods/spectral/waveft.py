"""WaveFT, as PEFT saves it: ``y = (W + scaling ΔW) x + b``, ΔW one level of an inverse 2-D wavelet transform.

N stored reals lie at random places of a layer's [O, I], drawn again from the seed as FourierFT's, and moved
to the centre of a grid of coefficients that is wider by the filter (L - 2, then made even). The grid's
quadrants are LL | HL over LH | HH, the first letter for the rows' axis, O. With U for upsampling by zeros and
* for convolution along one axis, ``ΔW = Σ_ab f_a *_O f_b *_I U(ab)``, cut to [O, I] from place L - 2 on.
With ``use_idwt=false`` the reals are entries of ΔW themselves.

Legend: T tokens, I in features, O out features, N stored coefficients, L taps of the filter.

Paper: arXiv 2505.12532; the grid and the filters are PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, CountPattern, Finite, PeftConfig, Seed, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.named_sizes import check_named_size
from timbre_methods.places import Draw, drawn_cells, drawn_places
from timbre_methods.program import AdapterProgram, Part, Spectral
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import sparse_part
from timbre_methods.spectral.fourierft import read_spectrum
from timbre_methods.spectral.wavelets import LOW_PASS

KEY = "waveft_spectrum"
KEYS = frozenset({KEY})


class WaveftConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights"})

    n_frequency: Count = 2592
    n_frequency_pattern: CountPattern | None = None
    proportional_parameters: bool = False
    scaling: Finite = 25.0
    random_loc_seed: Seed = 777
    wavelet_family: Annotated[str, Field(max_length=64)] = "db1"
    use_idwt: bool = True


class Waveft(Method[WaveftConfig]):
    name = "waveft"
    paper = "arXiv 2505.12532"
    stored = "n coefficients"
    regenerated = "places, from the seed"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "WAVEFT"

    def parse(self, raw_config: Mapping[str, Any]) -> WaveftConfig:
        config = read_config(WaveftConfig, raw_config)
        if config.use_idwt and config.wavelet_family not in LOW_PASS:
            raise UnsupportedMethod(
                f"WAVEFT: wavelet_family={shown(config.wavelet_family)} is not served: PEFT has no filter of "
                f"this name that works; train with one of {', '.join(LOW_PASS)}"
            )
        return config

    def compile(self, config: WaveftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: WaveftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            weight_OI = weight_OI + config.scaling * _delta(config, own[KEY].to(x_TI.dtype), weight_OI.shape)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        count, other = whole_number(8, 12, generator), whole_number(13, 24, generator)
        counts = {site.path: other for site in chosen[1::3]}
        families = list(LOW_PASS)
        options = {
            "n_frequency": count,
            "n_frequency_pattern": counts,
            "proportional_parameters": coin(generator),
            "scaling": 2.0 + whole_number(0, 20, generator),
            "random_loc_seed": whole_number(0, 1000, generator),
            "wavelet_family": families[whole_number(0, len(families) - 1, generator)],
            "use_idwt": whole_number(0, 3, generator) > 0,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }
        if options["proportional_parameters"]:
            whole = sum(site.out_features * site.in_features for site in chosen)
            share = count * len(chosen) / whole
            counts = {site.path: round(site.out_features * site.in_features * share) for site in chosen}
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": random_tensor((counts.get(site.path, count),), generator)
            for site in chosen
        }
        return peft_file("WAVEFT", chosen, options), tensors


def _part(config: WaveftConfig, found: SiteTensors) -> Part:
    spectrum_N = read_spectrum(found, KEY)
    # Shared out by the sizes of all layers, the count is whatever the tensor says.
    if not config.proportional_parameters:
        words = f"{len(spectrum_N)} coefficients"
        check_named_size(found, KEY, len(spectrum_N), words, config.n_frequency, config.n_frequency_pattern)
    site, device = found.site, spectrum_N.device
    c_N = spectrum_N.to(torch.float32) * config.scaling
    draw = Draw(config.random_loc_seed, site.out_features, site.in_features, c_N.numel())
    if config.use_idwt:
        return Spectral(c_N, drawn_places(draw, "dwt", LOW_PASS[config.wavelet_family], device))
    rows_N, columns_N = (cells_N.to(device) for cells_N in drawn_cells(draw, device))
    return sparse_part(site, rows_N, columns_N, c_N)


def _delta(config: WaveftConfig, spectrum_N: Tensor, shape: torch.Size) -> Tensor:
    """ΔW without its scale, by filling the whole grid and filtering it."""
    seeded = torch.Generator().manual_seed(config.random_loc_seed)
    cells_N = torch.randperm(shape.numel(), generator=seeded)[: len(spectrum_N)]
    grid = torch.zeros(shape.numel(), dtype=spectrum_N.dtype)
    grid[cells_N] = spectrum_N
    grid = grid.view(shape)
    if not config.use_idwt:
        return grid
    low = torch.tensor(LOW_PASS[config.wavelet_family], dtype=grid.dtype)
    high = low.flip(0) * torch.tensor([1.0, -1.0], dtype=grid.dtype).repeat(len(low) // 2)
    side = (len(low) - 2) // 2
    right, bottom = (side + size % 2 for size in (shape[1], shape[0]))
    top_half, bottom_half = torch.nn.functional.pad(grid, (side, right, side, bottom)).chunk(2, 0)
    ll, hl = top_half.chunk(2, 1)
    lh, hh = bottom_half.chunk(2, 1)
    left = _synthesis(ll, low) + _synthesis(hl, high)
    right_half = _synthesis(lh, low) + _synthesis(hh, high)
    whole = _synthesis(left.T, low) + _synthesis(right_half.T, high)
    return whole.T[2 * side : 2 * side + shape[0], 2 * side : 2 * side + shape[1]]


def _synthesis(band: Tensor, taps: Tensor) -> Tensor:
    """Upsample the rows' axis by two and convolve it."""
    whole = band.new_zeros(2 * len(band) + len(taps) - 2, band.shape[1])
    for j, tap in enumerate(taps):
        whole[j : j + 2 * len(band) - 1 : 2] += tap * band
    return whole
