"""Arrow: a mixture of finished LoRAs without a learned router.

    l_e = |v_e · x|,  y = W x + b + Σ_e g_e s_e B_e A_e x

``v_e`` is the right singular vector of ``B_e A_e`` of the largest singular value, its prototype; g is the
softmax of ``l / router_temperature`` over the ``top_k`` largest l. Prototypes are not in the file: they are
derived once, exactly (``svd``), or by PEFT's 15 steps of a power iteration from a seed (``peft``), which have
not converged where the first two singular values are near. The seed is torch's generator's on the CPU, in
float32: what PEFT computes of float32 LoRAs there.

With general experts (GenKnowSub) the mean of their A is taken from each A, and that of their B from each B,
before anything else.

Legend: T tokens, I in features, O out features, R rank, E experts, M min(I, R).

Papers: arXiv 2405.11157 section 4.1; GenKnowSub arXiv 2505.10939.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram
from timbre_methods.routed.low_rank_experts import (
    Factors,
    NumExperts,
    Scales,
    check_top_k,
    example_experts,
    expert_keys,
    largest,
    plain_output,
    read_experts,
    scaled_experts,
)
from timbre_methods.routing import MAX_EXPERTS, Routed, Router, Rule
from timbre_methods.site_tensors import (
    SiteTensors,
    derived_name,
    tensors_by_site,
    tensors_of_site,
)

GENERAL = "general"
PROTOTYPES = "arrow_prototypes"
PEFT_STEPS, PEFT_EPSILON = 15, 1e-8


class ArrowConfig(PeftConfig):
    """``scales`` has one entry for each expert. ``rng_seed`` is read by PEFT's prototypes alone."""

    reasons = MappingProxyType(
        {"use_gks": "write num_general, the number of general experts in the file; 0 is none"}
    )

    scales: Scales
    top_k: NumExperts = 3
    router_temperature: Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e6)] = 1.0
    prototypes: Literal["svd", "peft"]
    rng_seed: Seed | None = None
    num_general: Annotated[int, Field(ge=0, le=MAX_EXPERTS)] = 0


class Arrow(Method[ArrowConfig]):
    name = "arrow"
    paper = "arXiv 2405.11157"
    stored = "of each expert A [r, in] and B [out, r]; the same of general experts"
    regenerated = "prototypes, from the experts"
    checked_against = "PEFT's Arrow layers"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ARROW"

    def parse(self, raw_config: Mapping[str, Any]) -> ArrowConfig:
        config = read_config(ArrowConfig, raw_config)
        check_top_k("ARROW", "top_k", config.top_k, len(config.scales))
        if (config.rng_seed is None) == (config.prototypes == "peft"):
            raise InvalidConfig(
                f"ARROW: rng_seed: found {config.rng_seed} with prototypes={config.prototypes!r}; "
                'expected the seed of the training with "peft", and none with "svd"'
            )
        return config

    def derive(self, config: ArrowConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, _keys(config)):
            experts = _experts(config, found)
            for expert in experts:
                _check_finite(found, expert)
            prototypes = [_prototype(config, *expert) for expert in experts]
            derived[derived_name(found.site.path, PROTOTYPES)] = torch.stack(prototypes)
        return derived

    def compile(self, config: ArrowConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, _keys(config))
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: ArrowConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO, dtype = plain_output(site, x_TI), x_TI.dtype
        own = {key: t.to(dtype) for key, t in tensors_of_site(tensors, site, _keys(config)).items()}
        if not own:
            return y_TO
        deltas = []
        for e in range(len(config.scales)):
            a_RI, b_OR = (own[f"experts.{e}.{factor}"].clone() for factor in FACTORS)
            for g in range(config.num_general):
                a_RI -= own[f"general.{g}.lora_A.weight"] / config.num_general
                b_OR -= own[f"general.{g}.lora_B.weight"] / config.num_general
            deltas.append(torch.einsum("or,ri->oi", b_OR, a_RI))
        nearness_TE = torch.stack([(x_TI @ _dense_prototype(config, d_OI)).abs() for d_OI in deltas], dim=1)
        left_out_TE = ~largest(nearness_TE, config.top_k)
        gates_TE = torch.softmax(
            (nearness_TE / config.router_temperature).masked_fill(left_out_TE, -torch.inf), 1
        )
        for gate_T, delta_OI, s in zip(gates_TE.T, deltas, config.scales, strict=True):
            y_TO = y_TO + s * gate_T[:, None] * torch.einsum("oi,ti->to", delta_OI, x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, num_experts = chosen_sites(sites, generator), whole_number(2, 3, generator)
        num_general = whole_number(0, 2, generator)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            rank = whole_number(1, 3, generator) if num_general else None
            tensors |= example_experts(site, num_experts, generator, rank=rank)
            general = example_experts(site, num_general, generator, GENERAL, rank)
            tensors |= {name: 0.4 * tensor for name, tensor in general.items()}
        options: dict[str, Any] = {
            "scales": [whole_number(1, 8, generator) / 4 for _ in range(num_experts)],
            "top_k": 2,
            "router_temperature": whole_number(1, 8, generator) / 2,
            "prototypes": "svd",
            "num_general": num_general,
        }
        if coin(generator):
            options |= {"prototypes": "peft", "rng_seed": whole_number(0, 1000, generator)}
        return peft_file("ARROW", chosen, options), tensors


def _keys(config: ArrowConfig) -> frozenset[str]:
    return expert_keys(len(config.scales)) | expert_keys(config.num_general, GENERAL)


def _experts(config: ArrowConfig, found: SiteTensors) -> Sequence[Factors]:
    """Without what they have in common with the general ones."""
    experts = read_experts(found, len(config.scales))
    general = read_experts(found, config.num_general, GENERAL)
    if not general:
        return experts
    for pair in (*experts, *general):
        if pair[0].shape != experts[0][0].shape:
            raise InvalidTensors(
                f"{found.site.path}: found experts of ranks {len(pair[0])} and {len(experts[0][0])}, "
                "expected one rank for all, since general experts are taken from the others factor by factor"
            )
    mean_RI, mean_OR = (torch.stack(list(each)).mean(0) for each in zip(*general, strict=True))
    return [(a_RI - mean_RI, b_OR - mean_OR) for a_RI, b_OR in experts]


def _check_finite(found: SiteTensors, factors: Factors) -> None:
    if not all(factor.is_meta or torch.isfinite(factor).all() for factor in factors):
        raise InvalidTensors(
            f"{found.site.path}: an expert without the mean of the general ones comes to more than float32 "
            "holds; train them with smaller values"
        )


def _routed(config: ArrowConfig, found: SiteTensors) -> Routed:
    experts = _experts(config, found)
    rule = Rule(
        logits="absolute",
        scale=1 / config.router_temperature,
        keep="top_k",
        top_k=config.top_k,
        gate="renormalised",
    )
    router = Router(found.derived[PROTOTYPES].to(torch.float32, copy=True), rule)
    return Routed(scaled_experts(experts, config.scales), router)


def _prototype(config: ArrowConfig, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """[I], float32, of unit length and either sign; zeros of an expert that does nothing at the layer: no row
    is near it."""
    if a_RI.is_meta:
        return a_RI.new_empty(a_RI.shape[1])
    if config.prototypes == "svd":
        q_IM, triangle_MR = torch.linalg.qr(a_RI.to("cpu", torch.float64).T)
        core_OM = b_OR.to("cpu", torch.float64) @ triangle_MR.T
        _, s_M, right_MM = torch.linalg.svd(core_OM, full_matrices=False)
        first_I: Tensor = torch.mv(q_IM, right_MM[0]) * s_M[0].sign()
        return first_I.to(torch.float32)
    assert config.rng_seed is not None
    return _power_iteration(a_RI.cpu(), b_OR.cpu(), config.rng_seed)


def _power_iteration(a_RI: Tensor, b_OR: Tensor, seed: int) -> Tensor:
    """PEFT's, step by step in float32: the same bits on a machine with the same products."""
    gram_RR = b_OR.T @ b_OR
    v_I = torch.randn(a_RI.shape[1], generator=torch.Generator().manual_seed(seed))
    v_I = v_I / (v_I.norm() + PEFT_EPSILON)
    for _ in range(PEFT_STEPS):
        w_I = a_RI.T @ (gram_RR @ (a_RI @ v_I))
        v_I = torch.div(w_I, w_I.norm() + PEFT_EPSILON)
    return v_I


def _dense_prototype(config: ArrowConfig, delta_OI: Tensor) -> Tensor:
    """For the reference, from ``B A`` itself."""
    gram_II = delta_OI.T @ delta_OI
    if not gram_II.any():
        return torch.zeros_like(gram_II[0])
    if config.rng_seed is None:
        vectors_II: Tensor = torch.linalg.eigh(gram_II).eigenvectors
        return vectors_II[:, -1]
    v_I = torch.randn(len(gram_II), generator=torch.Generator().manual_seed(config.rng_seed))
    v_I = v_I.to(gram_II.dtype)
    for _ in range(15):
        v_I = torch.nn.functional.normalize(gram_II @ v_I, dim=0)
    return v_I
