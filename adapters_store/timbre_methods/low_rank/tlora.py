"""TLoRA: a transform of the input and a residual, both tensor rings, ``y = (W T + Δ) x + b``.

``T[i, j] = tr(A¹[i₁, j₁] … Aᴰ[i_D, j_D])`` with cores [n_d, n_d, R, R], and
``Δ[o, i] = tr(B¹[o₁] … Bᴰ[o_D] C¹[i₁] … Cᴱ[i_E])`` with cores [n_d, R, R]. An index is split with its first
digit running fastest: ``i = i₁ + n₁ i₂ + n₁ n₂ i₃ …``. Δ is served as the LoRA of rank R² that it is;
``W (T − 1)`` has no small form on the output's side and is served dense. What joined cores would hold is
bounded before any is joined: small cores can stand for very large products.

Legend: T tokens, I in features, O out features, D digits of an index, R ring rank.

Paper: arXiv 2501.08727 equations 5 to 9; the file's layout is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file
from timbre_methods.program import AdapterProgram, Dense, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

MAX_DIGITS, MAX_RING_RANK = 8, 64
MAX_JOINED_CELLS = 2**26
"""Of a product of cores, 256 MiB: two halves of T of 16384 features, or a side of as many at ring rank 64."""
ROWS_AT_ONCE = 512
"""Rows of T that are made at a time, where they can be divided so."""
TRANSFORM, OUT, IN = "tlora_transform", "tlora_out", "tlora_in"
KEYS = frozenset(f"{stem}.{d}" for stem in (TRANSFORM, OUT, IN) for d in range(MAX_DIGITS))


class TloraConfig(PeftConfig):
    """Which of the two every layer has; all sizes are in the tensors."""

    transform: bool
    residual: bool


class Tlora(Method[TloraConfig]):
    name = "tlora"
    paper = "arXiv 2501.08727"
    stored = "cores [n_d, n_d, R, R] of T, cores [n_d, R, R] of Δ's sides"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "TLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> TloraConfig:
        return read_config(TloraConfig, raw_config)

    def compile(self, config: TloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: _parts(config, each) for each in found})

    def reference(self, config: TloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        rings = {stem: [own[k] for k in sorted(own) if k.startswith(stem)] for stem in (TRANSFORM, OUT, IN)}
        if rings[TRANSFORM]:
            weight_OI = weight_OI @ _by_entry(rings[TRANSFORM], site.in_features)
        if rings[OUT]:
            p_ORR = _chained(rings[OUT], site.out_features)
            q_IRR = _chained(rings[IN], site.in_features)
            weight_OI = weight_OI + torch.einsum("oab,iba->oi", p_ORR, q_IRR)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Two digits where a size has them; the transform, the residual, or both."""
        chosen, tensors = chosen_sites(sites, generator), {}
        has_transform = coin(generator)
        has_residual = coin(generator) or not has_transform

        def core(*shape: int) -> Tensor:
            return 0.5 * torch.randn(shape, generator=generator)

        for site in chosen:
            stem = f"{PREFIX}{site.path}"
            if has_transform:
                for d, n in enumerate(_digits(site.in_features)):
                    eye = torch.eye(n)[:, :, None, None] * torch.eye(2) / math.sqrt(2)
                    tensors[f"{stem}.{TRANSFORM}.{d}"] = eye + core(n, n, 2, 2) / 4
            if has_residual:
                for side, size in ((OUT, site.out_features), (IN, site.in_features)):
                    for d, n in enumerate(_digits(size)):
                        tensors[f"{stem}.{side}.{d}"] = core(n, 2, 2)
        return peft_file("TLORA", chosen, {"transform": has_transform, "residual": has_residual}), tensors


def _digits(size: int) -> tuple[int, ...]:
    """A size as two factors, or as itself."""
    first = next((n for n in (2, 3) if size % n == 0), size)
    return (first, size // first) if first != size else (size,)


def _parts(config: TloraConfig, found: SiteTensors) -> tuple[Part, ...]:
    site, parts = found.site, list[Part]()
    out = _cores(found, OUT, site.out_features, expected=config.residual)
    inner = _cores(found, IN, site.in_features, expected=config.residual)
    transform = _cores(found, TRANSFORM, site.in_features, expected=config.transform)
    if out:
        if out[0].shape[-1] != inner[0].shape[-1]:
            raise InvalidTensors(
                f"{found.name_of(IN)}: found ring rank {inner[0].shape[-1]}, expected {out[0].shape[-1]}"
            )
        for key, cores in ((OUT, out), (IN, inner)):
            _check_cells(found.name_of(key), math.prod(len(core) for core in cores), cores)
        p_ORR, q_IRR = _joined(out), _joined(inner)
        parts.append(LowRank(q_IRR.transpose(1, 2).flatten(1).T.contiguous(), p_ORR.flatten(1)))
    if transform:
        first, last = _halves(transform)
        for half in (first, last):
            _check_cells(found.name_of(TRANSFORM), math.prod(len(core) ** 2 for core in half), half)
        weight_OI = site.weight_OI.to(transform[0].device, torch.float32)
        parts.append(Dense(_transformed(weight_OI, first, last) - weight_OI))
    return tuple(parts)


def _cores(found: SiteTensors, stem: str, size: int, *, expected: bool) -> list[Tensor]:
    """A ring's cores in order, copied in float32, checked; empty where none is expected."""
    numbers = [d for d in range(MAX_DIGITS) if f"{stem}.{d}" in found.tensors]
    if not numbers and not expected:
        return []
    if not expected:
        raise InvalidTensors(f"{found.name_of(f'{stem}.0')} is surplus: the config says that there is none")
    if numbers != list(range(max(1, len(numbers)))):
        first = next(d for d in range(MAX_DIGITS) if d not in numbers)
        raise InvalidTensors(f"{found.name_of(f'{stem}.{first}')} is missing: found the cores {numbers}")
    ring = found.tensors[f"{stem}.0"].shape[-1] if found.tensors[f"{stem}.0"].ndim else 0
    sides = ("n", "n") if stem == TRANSFORM else ("n",)
    cores = [found.need(f"{stem}.{d}", (*sides, ring, ring)).to(torch.float32, copy=True) for d in numbers]
    if not 1 <= ring <= MAX_RING_RANK:
        raise InvalidTensors(f"{found.name_of(stem)}: found ring rank {ring}, expected 1 to {MAX_RING_RANK}")
    shapes = [list(core.shape[: len(sides)]) for core in cores]
    if any(shape[0] < 2 for shape in shapes):
        raise InvalidTensors(f"{found.name_of(stem)}: found digits {shapes}, expected each to be 2 at least")
    if any(len(set(shape)) > 1 for shape in shapes) or math.prod(shape[0] for shape in shapes) != size:
        raise InvalidTensors(
            f"{found.name_of(stem)}: found digits {shapes}, expected a product of {size}; "
            "a core is missing or too large"
        )
    return cores


def _halves(cores: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Where to cut a ring so that the larger half joins to as little as it can; the second may be empty."""

    def larger(cut: int) -> int:
        return max(math.prod(len(core) for core in half) for half in (cores[:cut], cores[cut:]))

    cut = min(range(1, len(cores)), key=larger, default=1)
    return cores[:cut], cores[cut:]


def _check_cells(name: str, pairs: int, cores: Sequence[Tensor]) -> None:
    """Refuses cores of which one join, by all its indices, is too large. One core alone is in the file."""
    cells = pairs * cores[0].shape[-1] ** 2 if len(cores) > 1 else 0
    if cells > MAX_JOINED_CELLS:
        raise InvalidTensors(
            f"{name}: found cores whose product has {cells} numbers, expected at most {MAX_JOINED_CELLS}; "
            "take a smaller ring rank or, of the transform, digits whose halves are near the root of the size"
        )


def _joined(cores: Sequence[Tensor]) -> Tensor:
    """[n, R, R]: the product of the cores' matrices at each index."""
    return reduce(lambda p, core: torch.einsum("iab,kbc->kiac", p, core).flatten(0, 1), cores)


def _transformed(weight_OI: Tensor, first: Sequence[Tensor], last: Sequence[Tensor]) -> Tensor:
    """``W T``. T is made some of its rows at a time, from its two halves alone."""

    def join(p: Tensor, core: Tensor) -> Tensor:
        joined = torch.einsum("ijab,klbc->kiljac", p, core)
        return joined.flatten(2, 3).flatten(0, 1)

    ring = first[0].shape[-1]
    closing = torch.eye(ring, device=weight_OI.device)[None, None]
    left, right = reduce(join, first), reduce(join, last) if last else closing
    step = max(1, ROWS_AT_ONCE // len(left))
    product_OI = torch.zeros_like(weight_OI)
    pieces = zip(torch.split(weight_OI, step * len(left), dim=1), torch.split(right, step), strict=True)
    for w_OC, right_KLRR in pieces:
        rows_CI = torch.einsum("ijab,klba->kilj", left, right_KLRR).flatten(2, 3).flatten(0, 1)
        product_OI.addmm_(w_OC, rows_CI)
    return product_OI


def _by_entry(cores: Sequence[Tensor], size: int) -> Tensor:
    """For the reference: T entry by entry."""
    entries = torch.empty(size, size, dtype=cores[0].dtype)
    for i in range(size):
        for j in range(size):
            product, i_left, j_left = torch.eye(cores[0].shape[-1], dtype=cores[0].dtype), i, j
            for core in cores:
                product = product @ core[i_left % core.shape[0], j_left % core.shape[0]]
                i_left, j_left = i_left // core.shape[0], j_left // core.shape[0]
            entries[i, j] = product.trace()
    return entries


def _chained(cores: Sequence[Tensor], size: int) -> Tensor:
    """For the reference: the matrices of one side, index by index."""
    matrices = []
    for index in range(size):
        product = torch.eye(cores[0].shape[-1], dtype=cores[0].dtype)
        for core in cores:
            product, index = product @ core[index % core.shape[0]], index // core.shape[0]
        matrices.append(product)
    return torch.stack(matrices)
