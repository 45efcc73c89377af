"""C3A, as PEFT saves it: ``y = (W + ΔW / I) x + b``, ΔW made of b x b circulant blocks.

Row i of block (m, n) is the kernel turned right by i: ``ΔW[mb + i, nb + j] = k[m, n, (j - i) mod b]``. So a
block's product is a circular cross-correlation, ``irfft(conj(rfft(k)) · rfft(x))``. The file's shapes say b,
which must be one that the config names.

Legend: T tokens, I in features, O out features, b block size, M = O/b, N = I/b, K = b/2 + 1.

Paper: arXiv 2407.19342.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, CountPattern, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.named_sizes import check_named_size
from timbre_methods.program import AdapterProgram, Circulant
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEY = "c3a_kernel"
KEYS = frozenset({KEY})


class C3aConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights"})

    block_size: Count = 256
    block_size_pattern: CountPattern | None = None


class C3a(Method[C3aConfig]):
    name = "c3a"
    paper = "arXiv 2407.19342"
    stored = "kernels [out / b, in / b, b]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "C3A"

    def parse(self, raw_config: Mapping[str, Any]) -> C3aConfig:
        return read_config(C3aConfig, raw_config)

    def compile(self, config: C3aConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: C3aConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            kernel_MNb = own[KEY].to(x_TI.dtype)
            rows = [kernel_MNb.roll(i, dims=2).flatten(1) for i in range(kernel_MNb.shape[2])]
            delta_OI = torch.stack(rows, dim=1).flatten(0, 1)
            weight_OI = weight_OI + delta_OI / site.in_features
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        tensors, sizes = {}, {}
        for site in chosen:
            common = math.gcd(site.out_features, site.in_features)
            divisors = [b for b in range(1, common + 1) if common % b == 0]
            b = sizes[site.path] = divisors[whole_number(0, len(divisors) - 1, generator)]
            shape = (site.out_features // b, site.in_features // b, b)
            tensors[f"{PREFIX}{site.path}.{KEY}"] = 8 * random_tensor(shape, generator)
        options = {
            "block_size": sizes.pop(chosen[0].path),
            "block_size_pattern": sizes,
            "init_weights": "xavier_uniform",
            "bias": "none",
            "modules_to_save": None,
        }
        return peft_file("C3A", chosen, options), tensors


def _part(config: C3aConfig, found: SiteTensors) -> Circulant:
    site = found.site
    b = found.need(KEY, ("out / b", "in / b", "b")).shape[2]
    check_named_size(found, KEY, b, f"blocks of {b}", config.block_size, config.block_size_pattern)
    if site.out_features % b or site.in_features % b:
        raise InvalidTensors(
            f"{found.name_of(KEY)}: found blocks of {b}, expected a divisor of both "
            f"{site.out_features} and {site.in_features}"
        )
    kernel_MNb = found.need(KEY, (site.out_features // b, site.in_features // b, b)).to(torch.float32)
    spectrum_MNK = torch.fft.rfft(kernel_MNb / site.in_features).conj()
    return Circulant(torch.view_as_real(spectrum_MNK.resolve_conj()), b)
