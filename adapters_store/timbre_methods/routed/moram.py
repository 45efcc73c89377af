"""MoRAM (MoRA): a LoRA grown task by task, whose ranks choose themselves.

    p = A x,  n = p / |p|,  y = W x + b + B (g ∘ p)

g is the softmax of ``n / tau`` over the max(k, 2) largest of n, and then 0 where n lies below delta. There is
no router: A is the router. Ranks of tasks that are done have no scale, and a file holds no others. The
training does not save tau, k and delta, so whoever uploads must.

Legend: T tokens, I in features, O out features, R ranks of all tasks.

Paper: arXiv 2506.21035; the public code for delta and for the missing scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    check_top_k,
    largest,
    plain_output,
    single_ranks,
)
from timbre_methods.routing import MAX_EXPERTS, Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset(FACTORS)
SMALLEST_CHOICE = 2
NOT_SAVED: Mapping[str, str] = {
    "tau": "the temperature of its training, such as 0.03",
    "k": "how many ranks its training kept, such as 8",
    "delta": "the gate's lower bound at inference, such as 0.2",
}
"""What the training leaves out of its config, and what to write there."""


class MoramConfig(PeftConfig):
    """``r_sum`` is the number of ranks of all tasks; ``r`` is that of the last one, and scales nothing."""

    inert = frozenset({"init_lora_weights", "lora_alpha", "lora_dropout", "r"})

    tau: Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e6)]
    k: NumExperts
    delta: Finite
    r_sum: Annotated[int, Field(ge=SMALLEST_CHOICE, le=MAX_EXPERTS)]


class Moram(Method[MoramConfig]):
    name = "moram"
    paper = "arXiv 2506.21035"
    stored = "A [R, in], B [out, R]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MORAM"

    def parse(self, raw_config: Mapping[str, Any]) -> MoramConfig:
        for key, words in NOT_SAVED.items():
            if raw_config.get(key) is None:
                raise InvalidConfig(
                    f"MORAM: {key} is missing and no tensor tells it; write {words}, as {key!r} into "
                    "adapter_config.json"
                )
        config = read_config(MoramConfig, raw_config)
        check_top_k("MORAM", "k", _num_kept(config), config.r_sum)
        return config

    def compile(self, config: MoramConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_routed(config, each),) for each in found})

    def reference(self, config: MoramConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        a_RI, b_OR = (own[key] for key in FACTORS)
        p_TR = torch.einsum("ri,ti->tr", a_RI, x_TI)
        n_TR = torch.nn.functional.normalize(p_TR, dim=1)
        left_out_TR = ~largest(n_TR, max(config.k, 2))
        gates_TR = torch.softmax((n_TR / config.tau).masked_fill(left_out_TR, -torch.inf), 1)
        gates_TR = torch.where(n_TR < config.delta, 0.0, gates_TR)
        return y_TO + torch.einsum("or,tr->to", b_OR, gates_TR * p_TR)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        rank = whole_number(4, 6, generator)
        for site in chosen:
            stem = f"{PREFIX}{site.path}."
            tensors[stem + FACTORS[0]] = random_tensor((rank, site.in_features), generator)
            tensors[stem + FACTORS[1]] = random_tensor((site.out_features, rank), generator)
        options = {
            "r": 2,
            "r_sum": rank,
            "lora_alpha": 16,
            "tau": whole_number(1, 20, generator) / 20,
            "k": whole_number(1, 4, generator),
            "delta": whole_number(0, 6, generator) / 20,
        }
        return peft_file("MORAM", chosen, options), tensors


def _num_kept(config: MoramConfig) -> int:
    return max(config.k, SMALLEST_CHOICE)


def _routed(config: MoramConfig, found: SiteTensors) -> Routed:
    key_a, key_b = FACTORS
    a_RI = found.need(key_a, ("R", found.site.in_features)).to(torch.float32, copy=True)
    if len(a_RI) != config.r_sum:
        raise InvalidTensors(
            f"{found.name_of(key_a)}: found {len(a_RI)} ranks, the config says r_sum={config.r_sum}"
        )
    b_OR = found.need(key_b, (found.site.out_features, len(a_RI))).to(torch.float32, copy=True)
    rule = Rule(
        logits="unit",
        scale=1 / config.tau,
        keep="top_k",
        top_k=_num_kept(config),
        gate="renormalised",
        floor=config.delta,
    )
    return Routed(single_ranks(a_RI, b_OR), Router(a_RI, rule))
