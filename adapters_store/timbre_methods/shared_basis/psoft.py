"""PSOFT, as PEFT saves it: ``y = W x + b + s B (R − I) A x``, a turn among the first singular directions.

``W ≈ U Σ V`` truncated to r triplets. ``psoft_init``: A = V, B = U Σ / s; ``pissa_init``: the root of Σ / s
in both; with s = psoft_alpha / r. So s cancels, and only has to be positive: the change is
``U Σ (R − I) V``, or ``U √Σ (R − I) √Σ V``. R is ``diag(b) Q diag(a)``, where Q is the Cayley transform
``(I + K) (I − K)^-1`` of a skew K (or the first terms of its series), or the stored matrix itself with
``psoft_orth=false``.

The file never holds A and B, and R acts between them, so a flipped sign of one singular pair would be
another adapter. They are derived once, with PEFT's own calls; a file that was trained where LAPACK chooses
other signs than on this machine means something else here, and nothing in it can tell.

The randomised SVD multiplies W by r columns ``psoft_svd_lowrank_niter + 1`` times, there and back, and a
small file may ask for that at every layer: `MAX_PRODUCTS` bounds the sum.

Legend: T tokens, I in features, O out features, R rank, N entries above a diagonal.

Paper: openreview.net/forum?id=FSHrinMArK; the series: OFT v2, arXiv 2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import Triplets, seeded_svd_lowrank, thin_svd
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

CORE, SCALE_B, SCALE_A = "psoft_R.weight", "psoft_R.vector_b", "psoft_R.vector_a"
KEYS = frozenset({CORE, SCALE_B, SCALE_A})
LEFT, SIGMA, RIGHT = "left", "sigma", "right"

MAX_PRODUCTS = 10**13
"""The most products of a weight and a number in all randomised SVDs of one adapter: rank 128 and 10
iterations on every linear layer of a model of eight billion weights."""


class PsoftConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "psoft_dropout"})

    r: Rank = 32
    psoft_alpha: Finite = 32.0
    ab_svd_init: Literal["psoft_init", "pissa_init"] = "psoft_init"
    psoft_svd: Literal["full", "lowrank"] = "full"
    psoft_svd_lowrank_niter: Annotated[int, Field(ge=0, le=100)] = 10
    random_seed: Seed = 0
    psoft_orth: bool = True
    psoft_mag_b: bool = True
    psoft_mag_a: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Annotated[int, Field(ge=1, le=100)] = 5
    cayley_neumann_eps: Annotated[float, Field(gt=0, lt=1)] | None = None


class Psoft(Method[PsoftConfig]):
    name = "psoft"
    paper = "openreview.net/forum?id=FSHrinMArK"
    stored = "r (r - 1) / 2 angles, or R [r, r]; gains [r] on both sides"
    regenerated = "the first r singular triplets, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PSOFT"

    def parse(self, raw_config: Mapping[str, Any]) -> PsoftConfig:
        return read_config(PsoftConfig, raw_config)

    def derive(self, config: PsoftConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        adapted = list(tensors_by_site(tensors, sites, KEYS))
        _check_products(config, [found.site for found in adapted])
        for found in adapted:
            _check_rank(config, found.site)
            for key, tensor in zip((LEFT, SIGMA, RIGHT), _triplets(config, found.site), strict=True):
                derived[derived_name(found.site.path, key)] = tensor.contiguous()
        return derived

    def compile(self, config: PsoftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        if config.psoft_alpha <= 0:
            raise InvalidConfig(
                f"psoft_alpha: found {config.psoft_alpha}, expected more than 0: the formula divides by it"
            )
        return AdapterProgram(
            {found.site.path: (_factors(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: PsoftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS) if config.psoft_orth else ():
            core_RR, is_solved = _orthogonal(config, found.tensors[CORE].to(torch.float32))
            if not (is_solved and core_RR.isfinite().all()):
                largest = float(found.tensors[CORE].abs().max())
                raise InvalidTensors(
                    f"{found.name_of(CORE)}: found angles up to {largest:.3g}, of which float32 gives no "
                    "orthogonal matrix, expected smaller ones"
                )

    def reference(self, config: PsoftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        triplets = [tensors[derived_name(site.path, key)] for key in (LEFT, SIGMA, RIGHT)]
        left_OR, sigma_R, right_RI = (tensor.to(x_TI.dtype) for tensor in triplets)
        s = config.psoft_alpha / config.r
        if config.ab_svd_init == "psoft_init":
            a_RI, b_OR = right_RI, left_OR @ torch.diag(sigma_R / s)
        else:
            root_RR = torch.diag(sigma_R / s).sqrt()
            a_RI, b_OR = root_RR @ right_RI, left_OR @ root_RR
        z_TR = x_TI @ a_RI.T
        turned_TR = z_TR * own.get(SCALE_A, torch.ones_like(sigma_R))
        turned_TR = turned_TR @ _reference_core(config, own[CORE]).T
        turned_TR = turned_TR * own.get(SCALE_B, torch.ones_like(sigma_R))
        return y_TO + s * ((turned_TR - z_TR) @ b_OR.T)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        config = PsoftConfig(
            r=whole_number(2, 5, generator),
            psoft_alpha=float(whole_number(1, 9, generator)),
            ab_svd_init="pissa_init" if coin(generator) else "psoft_init",
            psoft_svd="lowrank" if coin(generator) else "full",
            random_seed=whole_number(0, 9, generator),
            psoft_orth=whole_number(0, 3, generator) > 0,
            psoft_mag_b=coin(generator),
            psoft_mag_a=coin(generator),
            use_cayley_neumann=coin(generator),
            num_cayley_neumann_terms=whole_number(2, 6, generator),
            cayley_neumann_eps=0.4 if coin(generator) else None,
        )
        tensors = {}
        for site in chosen:
            stem = PREFIX + site.path
            shape = (config.r * (config.r - 1) // 2,) if config.psoft_orth else (config.r, config.r)
            # Far enough below the bound of cayley_neumann_eps, or it would hide a change of scale.
            strength = 0.1 if config.cayley_neumann_eps else 0.6
            tensors[f"{stem}.{CORE}"] = strength * random_tensor(shape, generator)
            if config.psoft_mag_b:
                tensors[f"{stem}.{SCALE_B}"] = 1 + random_tensor((config.r,), generator)
            if config.psoft_mag_a:
                tensors[f"{stem}.{SCALE_A}"] = 1 + random_tensor((config.r,), generator)
        options = {"init_weights": True, "modules_to_save": None, "psoft_dropout": 0.0}
        return peft_file("PSOFT", chosen, {**options, **config.model_dump()}), tensors


def _triplets(config: PsoftConfig, site: Site) -> Triplets:
    if config.psoft_svd == "full":
        return thin_svd(site.weight_OI).first(config.r)
    return seeded_svd_lowrank(site.weight_OI, config.r, config.psoft_svd_lowrank_niter, config.random_seed)


def _check_rank(config: PsoftConfig, site: Site) -> None:
    smaller = min(site.out_features, site.in_features)
    if config.r > smaller:
        raise InvalidConfig(
            f"r: found {config.r}, expected at most {smaller}, the smaller side of {site.path}"
        )


def _check_products(config: PsoftConfig, sites: list[Site]) -> None:
    columns = config.r * (config.psoft_svd_lowrank_niter + 1) if config.psoft_svd == "lowrank" else 0
    products = columns * sum(site.out_features * site.in_features for site in sites)
    if products > MAX_PRODUCTS:
        raise InvalidConfig(
            f"psoft_svd_lowrank_niter: found {products} products (r x (iterations + 1) x the weights of "
            f"{len(sites)} layers), expected at most {MAX_PRODUCTS}: take fewer iterations or a smaller r"
        )


def _factors(config: PsoftConfig, found: SiteTensors) -> LowRank:
    rank = config.r
    _check_rank(config, found.site)
    gains = {}
    for key, is_on in ((SCALE_B, config.psoft_mag_b), (SCALE_A, config.psoft_mag_a)):
        if is_on:
            gains[key] = found.need(key, (rank,)).to(torch.float32)
        elif key in found.tensors:
            option = "psoft_mag_b" if key == SCALE_B else "psoft_mag_a"
            raise InvalidTensors(f"{found.name_of(key)} is surplus: the config says {option}=false")
    if config.psoft_orth:
        core_RR, _ = _orthogonal(config, found.need(CORE, (rank * (rank - 1) // 2,)).to(torch.float32))
    else:
        core_RR = found.need(CORE, (rank, rank)).to(torch.float32)
    if SCALE_B in gains:
        core_RR = gains[SCALE_B][:, None] * core_RR
    if SCALE_A in gains:
        core_RR = core_RR * gains[SCALE_A]
    change_RR = core_RR - torch.eye(rank, device=core_RR.device)
    left_OR, sigma_R, right_RI = (found.derived[key] for key in (LEFT, SIGMA, RIGHT))
    if config.ab_svd_init == "psoft_init":
        change_RR = sigma_R[:, None] * change_RR
    else:
        change_RR = sigma_R.sqrt()[:, None] * change_RR * sigma_R.sqrt()
    return LowRank(a_RI=right_RI.clone(), b_OR=left_OR @ change_RR)


def _orthogonal(config: PsoftConfig, angles_N: Tensor) -> tuple[Tensor, Tensor]:
    """Q from the entries of K above its diagonal, row by row, and whether it could be solved for."""
    rank = config.r
    k_RR = torch.zeros(rank, rank, device=angles_N.device)
    rows, columns = torch.triu_indices(rank, rank, offset=1, device=angles_N.device)
    k_RR[rows, columns] = angles_N
    k_RR = k_RR - k_RR.T
    one_RR = torch.eye(rank, device=angles_N.device)
    if not config.use_cayley_neumann:
        solved = torch.linalg.solve_ex(one_RR - k_RR, one_RR + k_RR, left=False)
        return solved.result, solved.info == 0
    if config.cayley_neumann_eps is not None:
        norm = torch.linalg.vector_norm(k_RR)
        k_RR = k_RR * torch.clamp(config.cayley_neumann_eps / norm.clamp(min=1e-30), max=1.0)
    # I + 2K + 2K² + … + 2K^(n-2) + K^(n-1) for n terms; three give four, as in PEFT.
    num_terms = config.num_cayley_neumann_terms
    weights = [2.0] * (num_terms - 1) if num_terms < 3 else [*[2.0] * (max(num_terms, 4) - 2), 1.0]
    core_RR, power_RR = one_RR, one_RR
    for weight in weights:
        power_RR = power_RR @ k_RR
        core_RR = core_RR + weight * power_RR
    return core_RR, torch.ones((), dtype=torch.bool, device=core_RR.device)


def _reference_core(config: PsoftConfig, stored: Tensor) -> Tensor:
    """Q as the paper has it: an inverse, or a sum of powers."""
    if not config.psoft_orth:
        return stored
    k_RR = stored.new_zeros(config.r, config.r)
    entries = iter(stored)
    for row in range(config.r):
        for column in range(row + 1, config.r):
            k_RR[row, column] = next(entries)
            k_RR[column, row] = -k_RR[row, column]
    one_RR = torch.eye(config.r, dtype=stored.dtype)
    if not config.use_cayley_neumann:
        inverse_RR: Tensor = torch.linalg.inv(one_RR - k_RR)
        return (one_RR + k_RR) @ inverse_RR
    if config.cayley_neumann_eps is not None and k_RR.norm() > config.cayley_neumann_eps:
        k_RR = k_RR / k_RR.norm() * config.cayley_neumann_eps
    num_terms = config.num_cayley_neumann_terms
    if num_terms < 3:
        return one_RR + 2 * (num_terms - 1) * k_RR
    last = max(num_terms - 1, 3)
    powers: list[Tensor] = [torch.linalg.matrix_power(k_RR, exponent) for exponent in range(1, last + 1)]
    return one_RR + 2 * torch.stack(powers[:-1]).sum(0) + powers[-1]
