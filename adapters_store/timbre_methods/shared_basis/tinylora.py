"""TinyLoRA, as PEFT saves it: ``y = W x + b + B R A x`` with ``R = Σ_u v_u P_u``.

A and B are the top singular directions of W with a root of the singular value in each; the file holds them.
v is the trained vector of a group of layers. Layer number i of N adapted ones, in model order, belongs to
group ``min(i // max(1, N // G), G - 1)`` with ``G = max(1, round(N (1 - weight_tying)))``. P is in the file,
or drawn again from ``projection_seed + i`` and rounded to the base's dtype, as PEFT does. Then R is
derived, so that P is drawn once, at registration. An embedding's table E is W there, ``E + B R A`` with
B [V, r], and what is added is not scaled where the base scales what it looks up.

Legend: T tokens, I in features, O out features, N rows and C columns of what ``B R A`` is added to,
V vocabulary, R rank, U length of v.

Paper: arXiv 2602.04118.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, Rank, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import thin_svd
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.replaced import stored_shape
from timbre_methods.shared_basis.model_tensors import model_tensor
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

A, B, P = "tinylora_A", "tinylora_B", "tinylora_P"
KEYS = frozenset({A, B, P})
CORE = "core"
VECTOR = "base_model.tinylora_v."

_VECTOR_NAME = re.compile(re.escape(VECTOR) + r"(0|[1-9][0-9]{0,6})", re.ASCII)

MAX_DRAWN = 2**26
"""The most numbers of P that are drawn again for all layers of one adapter: 256 MiB at once at most."""


class TinyloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_v_bound", "init_weights", "tinylora_dropout"})

    r: Rank = 2
    u: Count = 64
    weight_tying: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    projection_seed: Seed = 42
    save_projection: bool = True


class Tinylora(Method[TinyloraConfig]):
    name = "tinylora"
    paper = "arXiv 2602.04118"
    stored = "A [r, in], B [out, r], P [u, r, r]; v [u] for a group of layers"
    regenerated = "P with save_projection=false, from the seed"
    checked_against = "PEFT"
    kinds = frozenset({"linear", "embedding"})
    derivation = 2  # 1 numbered the layers in the order of the base's calls.

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "TINYLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> TinyloraConfig:
        return read_config(TinyloraConfig, raw_config)

    def derive(self, config: TinyloraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        if config.save_projection:
            return {}
        adapted = _with_vectors(config, tensors, sites)
        _check_drawn(config, [own.site for own, _ in adapted])
        return {
            derived_name(own.site.path, CORE): _core(vector_U, _drawn(config, own.site, number))
            for number, (own, vector_U) in enumerate(adapted)
        }

    def compile(self, config: TinyloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts = {
            own.site.path: (_factors(config, own, vector_U),)
            for own, vector_U in _with_vectors(config, tensors, sites)
        }
        return AdapterProgram({path: parts[path] for path in sites if path in parts})

    def reference(self, config: TinyloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            # Names in files keep the model's order here: examples are written so.
            paths = [name[len(PREFIX) : -len(A) - 1] for name in tensors if name.endswith(A)]
            number, total = paths.index(site.path), len(paths)
            num_groups = max(1, round(total * (1.0 - config.weight_tying)))
            group = min(number // max(1, total // num_groups), num_groups - 1)
            core_RR = torch.zeros(len(own[A]), len(own[A]), dtype=x_TI.dtype)
            drawn_URR = own.get(P)
            if drawn_URR is None:
                shape = (config.u, *core_RR.shape)
                generator = torch.Generator().manual_seed(config.projection_seed + number)
                drawn_URR = torch.normal(0.0, 1.0 / len(core_RR) ** 0.5, size=shape, generator=generator)
                drawn_URR = drawn_URR.to(site.weight_OI.dtype)  # as PEFT keeps it
            for value, matrix_RR in zip(tensors[f"{VECTOR}{group}"], drawn_URR, strict=True):
                core_RR += value.to(x_TI.dtype) * matrix_RR.to(x_TI.dtype)
            change = own[B] @ (core_RR @ own[A])
            weight_OI = weight_OI + (change if site.kind == "linear" else change.T / site.scale)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = sorted(chosen_sites(sites, generator), key=_is_layer)
        config = TinyloraConfig(
            r=whole_number(1, 4, generator),
            u=whole_number(1, 6, generator),
            weight_tying=whole_number(0, 4, generator) / 4,
            projection_seed=whole_number(0, 1000, generator),
            save_projection=coin(generator),
        )
        tensors = {}
        for site in chosen:
            u_OR, sigma_R, v_RI = thin_svd(site.weight_OI).first(config.r)
            a_RI, b_OR = sigma_R.sqrt()[:, None] * v_RI, u_OR * sigma_R.sqrt()
            if site.kind == "embedding":
                a_RI, b_OR = b_OR.T.contiguous(), a_RI.T.contiguous()
            tensors[f"{PREFIX}{site.path}.{A}"] = a_RI
            tensors[f"{PREFIX}{site.path}.{B}"] = b_OR
            if config.save_projection:
                shape = (config.u, len(sigma_R), len(sigma_R))
                tensors[f"{PREFIX}{site.path}.{P}"] = random_tensor(shape, generator)
        for group in sorted(set(_groups(config, len(chosen)))):
            tensors[f"{VECTOR}{group}"] = 0.2 + random_tensor((config.u,), generator).abs()
        options = {"bias": "none", "init_weights": True, "init_v_bound": 0.02, "modules_to_save": None}
        return peft_file("TINYLORA", chosen, {**options, **config.model_dump()}), tensors


def _with_vectors(config: TinyloraConfig, tensors: Tensors, sites: Sites) -> list[tuple[SiteTensors, Tensor]]:
    """Each adapted layer in model order, and its group's v."""
    names = [name for name in tensors if _VECTOR_NAME.fullmatch(name)]
    found = sorted(tensors_by_site(tensors, sites, KEYS, beside=names), key=lambda own: _is_layer(own.site))
    groups = _groups(config, len(found))
    vectors = _vectors(config, tensors, names, max(groups) + 1)
    return [(own, vectors[group]) for own, group in zip(found, groups, strict=True)]


def _is_layer(site: Site) -> bool:
    """False for an embedding, which every base defines before its layers, wherever it is among the sites."""
    return site.kind != "embedding"


def _groups(config: TinyloraConfig, num_layers: int) -> list[int]:
    """The group of each adapted layer, in model order: 0, ..., each at least once."""
    num_groups = max(1, round(num_layers * (1.0 - config.weight_tying)))
    size = max(1, num_layers // num_groups)
    return [min(number // size, num_groups - 1) for number in range(num_layers)]


def _vectors(config: TinyloraConfig, tensors: Tensors, names: list[str], num_groups: int) -> list[Tensor]:
    expected = [f"{VECTOR}{group}" for group in range(num_groups)]
    for name in names:
        if name not in expected:
            raise InvalidTensors(f"{name} is surplus: the config and the layers say {num_groups} groups")
    return [model_tensor(tensors, name, (config.u,)).to(torch.float32) for name in expected]


def _factors(config: TinyloraConfig, own: SiteTensors, vector_U: Tensor) -> LowRank:
    site, rank = own.site, _rank(config, own.site)
    rows, columns = stored_shape(site) if site.kind == "embedding" else (site.out_features, site.in_features)
    a_RC = own.need(A, (rank, columns)).to(torch.float32, copy=True)
    b_NR = own.need(B, (rows, rank)).to(torch.float32)
    if config.save_projection:
        core_RR = _core(vector_U, own.need(P, (config.u, rank, rank)).to(torch.float32))
    elif P in own.tensors:
        raise InvalidTensors(f"{own.name_of(P)} is surplus: the config says save_projection=false")
    else:
        core_RR = own.derived[CORE]
    if site.kind == "embedding":
        a_RI = b_NR.T.clone(memory_format=torch.contiguous_format)
        return LowRank(a_RI=a_RI, b_OR=(core_RR @ a_RC).T / site.scale)
    return LowRank(a_RI=a_RC, b_OR=b_NR @ core_RR)


def _rank(config: TinyloraConfig, site: Site) -> int:
    return min(config.r, site.in_features, site.out_features)


def _core(vector_U: Tensor, p_URR: Tensor) -> Tensor:
    return torch.einsum("u,uqr->qr", vector_U, p_URR)


def _check_drawn(config: TinyloraConfig, sites: list[Site]) -> None:
    count = sum(config.u * _rank(config, site) ** 2 for site in sites)
    if count > MAX_DRAWN:
        raise InvalidConfig(
            f"projections of u={config.u}, r={config.r} on {len(sites)} layers are not drawn: found {count} "
            f"values, expected at most {MAX_DRAWN}; save with save_projection=true"
        )


def _drawn(config: TinyloraConfig, site: Site, number: int) -> Tensor:
    """P of the adapted layer of this number; on meta nothing is drawn."""
    rank = _rank(config, site)
    shape = (config.u, rank, rank)
    if site.weight_OI.is_meta:
        return torch.empty(shape, device="meta")
    generator = torch.Generator().manual_seed(config.projection_seed + number)
    drawn_URR = torch.normal(0.0, 1.0 / rank**0.5, size=shape, generator=generator)
    return drawn_URR.to(site.weight_OI.dtype).to(torch.float32)
