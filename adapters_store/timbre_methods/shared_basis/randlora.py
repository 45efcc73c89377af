"""RandLoRA, as PEFT saves it: ``y = W x + b + s M_big M_small x``, a full-rank change from random matrices.

With L the smaller and H the larger of in and out and N = ceil(L / R) blocks, from A [R, 1, L] and
B [H, N, R], random and the same for all layers, and the stored λ [R, N] and γ [N, L]::

    M_small[(j, n), l] = λ[j, n] A[j, 0, l] γ[n, l]      flattened with j first, [R N, L]
    M_big[h, (n, j)] = B[h, n, j]                        flattened with n first, [H, N R]

The two orders differ, and the product pairs equal flat places: so PEFT does it. Where in > out the product is
turned around, ``M_smallᵀ M_bigᵀ``. ``s = alpha / R``.

Legend: T tokens, I in features, O out features, R rank, N blocks, L and H the smaller and larger dimension.

Paper: arXiv 2502.00987 section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import interned_basis
from timbre_methods.config import Finite, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.shared_basis.vera import ProjectionConfig
from timbre_methods.shared_basis.whole_model import (
    LARGEST,
    Whole,
    drawn,
    largest_for_reference,
    largest_layer,
    saved,
)
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

LAMBDA, GAMMA = "randlora_lambda", "randlora_gamma"
COPIES = ("randlora_A", "randlora_B")
"""PEFT saves both matrices for every layer again. Equal copies are dropped."""
MATRICES = ("base_model.randlora_A", "base_model.randlora_B")
KEYS = frozenset({LAMBDA, GAMMA, *COPIES})

Shapes = tuple[tuple[int, int, int], tuple[int, int, int]]


class RandloraConfig(ProjectionConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "randlora_dropout"})

    r: Rank = 32
    randlora_alpha: Finite = 640.0
    sparse: bool = False
    very_sparse: bool = False


class Randlora(Method[RandloraConfig]):
    name = "randlora"
    paper = "arXiv 2502.00987"
    stored = "λ [r, n], γ [n, min(in, out)], n = ceil(min(in, out) / r); A and B once, or not"
    regenerated = "A and B, from the seed, with save_projection=false"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "RANDLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> RandloraConfig:
        return read_config(RandloraConfig, raw_config)

    def compile(self, config: RandloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        adapted = _by_site(tensors, sites)
        shapes = _shapes(config.r, *largest_layer([found.site for found in adapted]))
        if _is_saved(config, tensors):
            a, b = saved(tensors, MATRICES, shapes)
        else:
            device = next(iter(adapted[0].tensors.values())).device
            key = "randlora", config.projection_prng_key, shapes, config.sparse, config.very_sparse
            a, b = drawn(key, shapes, lambda: _draw(config, shapes, device))
        return AdapterProgram({found.site.path: (_part(config, shapes, found, a, b),) for found in adapted})

    def check_values(self, config: RandloraConfig, tensors: Tensors, sites: Sites) -> None:
        for found in _by_site(tensors, sites):
            for key, name in zip(COPIES, MATRICES, strict=True):
                if key in found.tensors and not torch.equal(
                    found.tensors[key].float(), tensors[name].float()
                ):
                    raise InvalidTensors(
                        f"{found.name_of(key)}: found another matrix than {name}, expected an equal copy"
                    )

    def reference(self, config: RandloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            lambda_RN, gamma_NL = own[LAMBDA].to(x_TI.dtype), own[GAMMA].to(x_TI.dtype)
            num_blocks, low = gamma_NL.shape
            a, b = (matrix.to(x_TI.dtype) for matrix in _reference_matrices(config, tensors, site))
            small = torch.einsum("jl,jn,nl->jnl", a[:, 0, :low], lambda_RN, gamma_NL).reshape(-1, low)
            big = b[: max(weight_OI.shape), :num_blocks].reshape(max(weight_OI.shape), -1)
            delta_HL = config.randlora_alpha / config.r * (big @ small)
            weight_OI = weight_OI + (delta_HL if delta_HL.shape == weight_OI.shape else delta_HL.T)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def for_reference(self, config: RandloraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        if _is_saved(config, tensors):
            return {}
        return largest_for_reference([found.site for found in _by_site(tensors, sites)])

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        rank, is_saved, is_sparse = whole_number(2, 6, generator), coin(generator), coin(generator)
        shapes = _shapes(rank, *largest_layer(chosen))
        matrices = [random_tensor(shape, generator) for shape in shapes]
        tensors = {}
        for site in chosen:
            stem, (num_blocks, low) = PREFIX + site.path, _blocks(rank, site)
            tensors[f"{stem}.{LAMBDA}"] = random_tensor((rank, num_blocks), generator)
            tensors[f"{stem}.{GAMMA}"] = random_tensor((num_blocks, low), generator)
            if is_saved:
                tensors |= {f"{stem}.{key}": m.clone() for key, m in zip(COPIES, matrices, strict=True)}
        if is_saved:
            tensors |= dict(zip(MATRICES, matrices, strict=True))
        options = {
            "r": rank,
            "randlora_alpha": whole_number(1, 4, generator),
            "projection_prng_key": whole_number(0, 1000, generator),
            "save_projection": is_saved,
            "sparse": is_sparse,
            "very_sparse": is_sparse and coin(generator),
            "randlora_dropout": 0.0,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        return peft_file("RANDLORA", chosen, options), tensors


def _is_saved(config: RandloraConfig, tensors: Tensors) -> bool:
    return config.save_projection or any(name in tensors for name in MATRICES)


def _by_site(tensors: Tensors, sites: Sites) -> list[SiteTensors]:
    return list(tensors_by_site(tensors, sites, KEYS, beside=MATRICES))


def _shapes(rank: int, max_out: int, max_in: int) -> Shapes:
    """Of A and B. The largest out and in may be of different layers."""
    low, high = min(max_out, max_in), max(max_out, max_in)
    return (rank, 1, low), (high, -(-low // rank), rank)


def _blocks(rank: int, site: Site) -> tuple[int, int]:
    """N and L of one layer."""
    low = min(site.in_features, site.out_features)
    return -(-low // rank), low


def _part(config: RandloraConfig, shapes: Shapes, found: SiteTensors, a: Whole, b: Whole) -> Projected:
    site, rank = found.site, config.r
    num_blocks, low = _blocks(rank, site)
    high = max(site.in_features, site.out_features)
    lambda_RN = found.need(LAMBDA, (rank, num_blocks))
    gamma_NL = found.need(GAMMA, (num_blocks, low)).to(torch.float32, copy=True)
    _check_copies(found, shapes, is_saved=not a.is_drawn)
    core_NR = (lambda_RN.to(torch.float32) * (config.randlora_alpha / rank)).T.contiguous()

    def small(a_R1L: Tensor) -> Tensor:
        return a_R1L[:, 0, :low]

    def big(b_HNR: Tensor) -> Tensor:
        """M_big with its columns sorted by the block of M_small that they meet."""
        flat = b_HNR[:high, :num_blocks].flatten(1)
        return flat.view(high, rank, num_blocks).transpose(1, 2).contiguous()

    of_a, of_b = low, (high, num_blocks)
    if site.in_features <= site.out_features:
        p = a.part(("in", of_a), site, lambda values: small(values)[None])
        q = b.part(("out", of_b), site, lambda values: big(values).transpose(0, 1))
        basis = interned_basis(p, q, gamma_NL.device)
        return Projected("diagonal", core_NR, basis, inner_NI=gamma_NL)
    p = b.part(("in", of_b), site, lambda values: big(values).permute(1, 2, 0).contiguous())
    q = a.part(("out", of_a), site, lambda values: small(values).T.contiguous()[None])
    return Projected("diagonal", core_NR, interned_basis(p, q, gamma_NL.device), outer_NO=gamma_NL)


def _check_copies(found: SiteTensors, shapes: Shapes, *, is_saved: bool) -> None:
    present = [key for key in COPIES if key in found.tensors]
    if present and not is_saved:
        raise InvalidTensors(f"{found.name_of(present[0])} is surplus: {MATRICES[0]} is not in the file")
    if present:
        for key, shape in zip(COPIES, shapes, strict=True):
            found.need(key, shape)


def _draw(config: RandloraConfig, shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """A, then B, from one CPU generator, each divided by its deviation; on meta nothing is drawn."""
    if device.type == "meta":
        return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        sparsity = math.sqrt(shapes[0][2]) if config.very_sparse else 3
        a, b = (_signs(torch.rand(shape, generator=generator), 1 / (2 * sparsity)) for shape in shapes)
        return a / a.std(), b / b.std()

    def uniform(rows: int, columns: int) -> Tensor:
        # In bfloat16, as PEFT draws where there is any; the bound is Kaiming's with a = sqrt(5).
        bound = math.sqrt(3) * (math.sqrt(2 / (1 + math.sqrt(5) ** 2)) / math.sqrt(columns))
        values = torch.empty(rows, columns, dtype=torch.bfloat16)
        return values.uniform_(-bound, bound, generator=generator).unsqueeze(1)

    (rank, _, low), (high, num_blocks, _) = shapes
    a = uniform(rank, low)
    b = torch.cat([uniform(high, rank) for _ in range(num_blocks)], dim=1)
    return a / a.std(), b / b.std()


def _signs(uniform: Tensor, share: float) -> Tensor:
    """-1 below the share, 1 above one minus the share, else 0."""
    return (uniform > 1 - share).float() - (uniform < share).float()


def _reference_matrices(config: RandloraConfig, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor]:
    if LARGEST not in tensors:
        return tensors[MATRICES[0]], tensors[MATRICES[1]]
    low, high = sorted(tensors[LARGEST].tolist())
    num_blocks = math.ceil(low / config.r)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    if config.sparse or config.very_sparse:
        s = low**0.5 if config.very_sparse else 3
        both = (config.r, 1, low), (high, num_blocks, config.r)
        uniform = [torch.rand(shape, generator=generator) for shape in both]
        edge = 1 / (2 * s)
        pair = [torch.where(u < edge, -1.0, torch.where(u > 1 - edge, 1.0, 0.0)) for u in uniform]
    else:
        shapes = [(config.r, 1, low)] + [(high, 1, config.r)] * num_blocks
        first, *others = [
            torch.nn.init.kaiming_uniform_(
                torch.empty(shape, dtype=torch.bfloat16), a=5**0.5, generator=generator
            )
            for shape in shapes
        ]
        pair = [first, torch.cat(others, dim=1)]
    a, b = ((matrix / matrix.std()).to(site.weight_OI.dtype) for matrix in pair)
    return a, b
