"""LoRA-Mixer: LoRAs at the projections of attention, mixed for each token by a router.

    p = softmax(R x + c),  y = W x + b + Σ_e g_e s_e B_e A_e x

The ``top_k`` largest p are kept, ``renormalised`` to a sum of 1 or as they are. Each projection has a router
of its own, or those that read an attention's input have one together; c is there with ``router_bias``. No
code is published and the paper leaves these choices open, so the config makes them.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2507.00029.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    Scales,
    check_top_k,
    example_experts,
    expert_keys,
    largest,
    plain_output,
    read_experts,
    reference_deltas,
    scaled_experts,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, check_tensor, tensors_by_site

ROUTER, ROUTER_BIAS = "router.weight", "router.bias"
READ_THE_INPUT = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "qkv_proj", "query", "key", "value", "query_key_value", "c_attn"),
        *("Wqkv", "in_proj"),
    }
)
"""What projections that read their attention's own input are called."""


class LoraMixerConfig(PeftConfig):
    """``routers``: one for each ``projection``, or one for the ``attention`` around them."""

    scales: Scales
    top_k: NumExperts
    renormalised: bool
    routers: Literal["projection", "attention"]
    router_bias: bool = False

    @property
    def router_keys(self) -> tuple[str, ...]:
        return (ROUTER, ROUTER_BIAS) if self.router_bias else (ROUTER,)


class LoraMixer(Method[LoraMixerConfig]):
    name = "lora_mixer"
    paper = "arXiv 2507.00029"
    stored = (
        "experts A [r, in], B [out, r]; a router [E, in], bias [E] or none, of its own or its attention's"
    )
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LORA_MIXER"

    def parse(self, raw_config: Mapping[str, Any]) -> LoraMixerConfig:
        config = read_config(LoraMixerConfig, raw_config)
        check_top_k("LORA_MIXER", "top_k", config.top_k, len(config.scales))
        return config

    def compile(self, config: LoraMixerConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        keys = expert_keys(len(config.scales))
        shared: dict[str, Router] = {}
        if config.routers == "projection":
            found = tensors_by_site(tensors, sites, keys | {*config.router_keys})
            return AdapterProgram({each.site.path: (_routed(config, each, shared),) for each in found})
        endings = tuple(f".{key}" for key in config.router_keys)
        of_attention = {name: tensors[name] for name in tensors if name.endswith(endings)}
        found = tensors_by_site(tensors, sites, keys, beside=of_attention)
        program = AdapterProgram(
            {each.site.path: (_routed(config, each, shared, of_attention),) for each in found}
        )
        taken = {f"{stem}.{key}" for stem in shared for key in config.router_keys}
        stray = next((name for name in of_attention if name not in taken), None)
        if stray is not None:
            raise InvalidTensors(f"{stray[:200]} is surplus: no projection of that attention has experts")
        return program

    def reference(self, config: LoraMixerConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        deltas = reference_deltas(tensors, site, len(config.scales), x_TI.dtype)
        if not deltas:
            return y_TO
        owner = site.path if config.routers == "projection" else site.path[: site.path.rindex(".")]
        router_EI = tensors[f"{PREFIX}{owner}.{ROUTER}"].to(x_TI.dtype)
        logits_TE = torch.einsum("ei,ti->te", router_EI, x_TI)
        if config.router_bias:
            logits_TE = logits_TE + tensors[f"{PREFIX}{owner}.{ROUTER_BIAS}"].to(x_TI.dtype)
        shares_TE = torch.softmax(logits_TE, 1)
        gates_TE = shares_TE * largest(shares_TE, config.top_k)
        if config.renormalised:
            gates_TE = gates_TE / gates_TE.sum(1, keepdim=True)
        for gate_T, delta_OI, s in zip(gates_TE.T, deltas, config.scales, strict=True):
            y_TO = y_TO + s * gate_T[:, None] * torch.einsum("oi,ti->to", delta_OI, x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, num_experts = chosen_sites(sites, generator), whole_number(2, 3, generator)
        readers = [site for site in chosen if _last_step(site.path) in READ_THE_INPUT]
        is_shared, has_bias = coin(generator) and bool(readers), coin(generator)
        tensors: dict[str, Tensor] = {}
        chosen = readers if is_shared else chosen
        for site in chosen:
            tensors |= example_experts(site, num_experts, generator)
            owner = _attention(site.path) if is_shared else site.path
            router_EI = random_tensor((num_experts, site.in_features), generator)
            tensors.setdefault(f"{PREFIX}{owner}.{ROUTER}", router_EI)
            if has_bias:
                tensors.setdefault(f"{PREFIX}{owner}.{ROUTER_BIAS}", random_tensor((num_experts,), generator))
        options = {
            "scales": [whole_number(1, 8, generator) / 4 for _ in range(num_experts)],
            "top_k": 2,
            "renormalised": coin(generator),
            "routers": "attention" if is_shared else "projection",
            "router_bias": has_bias,
        }
        return peft_file("LORA_MIXER", chosen, options), tensors


def _routed(
    config: LoraMixerConfig,
    found: SiteTensors,
    shared: dict[str, Router],
    of_attention: Mapping[str, Tensor] | None = None,
) -> Routed:
    """The mixture at one site; ``shared`` holds the routers of attentions met so far, by what their tensors'
    names begin with."""
    num_experts = len(config.scales)
    experts = scaled_experts(read_experts(found, num_experts), config.scales)
    shapes = {ROUTER: (num_experts, found.site.in_features), ROUTER_BIAS: (num_experts,)}
    if of_attention is None:
        return Routed(
            experts, _router(config, {key: found.need(key, shapes[key]) for key in config.router_keys})
        )
    path = found.site.path
    if _last_step(path) not in READ_THE_INPUT:
        raise InvalidTensors(
            f"{path!r} does not read its attention's input, or not by a known name, so that it cannot share "
            'a router; write "routers": "projection" and give each projection its own'
        )
    stem = PREFIX + _attention(path)
    for key in config.router_keys:
        name = f"{stem}.{key}"
        if name not in of_attention:
            raise InvalidTensors(f"{name} is missing, while the file holds experts of {path}")
        check_tensor(name, of_attention[name], shapes[key])
    if stem not in shared:
        shared[stem] = _router(config, {key: of_attention[f"{stem}.{key}"] for key in config.router_keys})
    return Routed(experts, shared[stem])


def _router(config: LoraMixerConfig, own: Mapping[str, Tensor]) -> Router:
    gate: Literal["renormalised", "softmax"] = "renormalised" if config.renormalised else "softmax"
    rule = Rule(keep="top_k", top_k=config.top_k, gate=gate)
    weight_EI = own[ROUTER].to(torch.float32, copy=True)
    bias_E = own[ROUTER_BIAS].to(torch.float32, copy=True) if config.router_bias else None
    return Router(weight_EI, rule, bias_E)


def _attention(path: str) -> str:
    return path.rpartition(".")[0]


def _last_step(path: str) -> str:
    return path.rpartition(".")[2]
