"""MixLoRA, as MoE-PEFT saves it: each MLP is a mixture of copies of itself, each with LoRAs of its own.

``y = Σ_e g_e(x) MLP_e(x)``, where each projection of MLP_e is ``W x + b + s B_e (A_e x)``; one that has no
experts is the base's. The router reads the MLP's input, p = softmax(R x):

* ``mixlora``: g is p divided by its sum over the ``top_k`` largest, 0 for the others;
* ``mixlora-dynamic``: the largest p / t are kept until their sum exceeds ``top_p``, the one that crosses it
  included, and g = p / t. t is the ``temperature``, where that is 0 it is 1. With another t the MLP's last
  projection, of every expert, is divided by it, base product and bias included.

Attention has plain LoRAs. ``s`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``;
``expert_lora`` has other values of these for the experts. `moe_peft` has the format.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2404.15159; code: github.com/TUDB-Labs/MoE-PEFT, moe_peft/adapters/mixlora.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.routed import moe_peft
from timbre_methods.routed.blocks import above
from timbre_methods.routed.low_rank_experts import (
    LoraSize,
    NumExperts,
    check_top_k,
    expert_deltas,
    expert_keys,
    experts_of_one_size,
    only_lora,
)
from timbre_methods.routed.moe_peft import GATE, MoePeftConfig
from timbre_methods.routed.mola import renormalised_reference
from timbre_methods.routing import Routed, RoutedBlock, Router, Rule
from timbre_methods.site_tensors import SiteTensors

MIXTURE = "mixlora"
TOP_K, TOP_P = "mixlora", "mixlora-dynamic"

MIN_TEMPERATURE = 1e-6

LAST = ("down_proj", "fc2", "dense_4h_to_h")
"""What MoE-PEFT calls the last projection of an MLP."""

_REFUSED_STRATEGIES: Mapping[str, str] = {
    "mixlora-switch": (
        "MoE-PEFT returns the MLP's input unchanged where it routes so at inference, and drops tokens by "
        "their neighbours in training; train with 'mixlora'"
    ),
    "mixtral": "it is a former name; if its gates are those of 'mixlora', call it so",
}


class ExpertLora(PeftConfig):
    """What of the config is another for the experts."""

    inert = MoePeftConfig.inert
    takes_beside = False
    reasons = MoePeftConfig.reasons

    r: Rank | None = None
    lora_alpha: Finite | None = None
    use_rslora: bool | None = None


class MixLoraConfig(MoePeftConfig):
    """The defaults are MoE-PEFT's."""

    inert = MoePeftConfig.inert | {"expert_capacity", "ffn_dropout", "router_z_loss_coef", "sparse_step"}
    reasons: ClassVar[Mapping[str, str]] = {
        **MoePeftConfig.reasons,
        "act_fn": "experts use the base's own activation; leave it out if it is that one",
    }

    routing_strategy: Annotated[str, Field(max_length=64)]
    expert_lora: dict[str, Any] | None = None
    top_k: NumExperts = 2
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.8
    temperature: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0

    @property
    def divisor(self) -> float:
        """t."""
        return self.temperature if self.routing_strategy == TOP_P and self.temperature > 0 else 1.0

    @property
    def rule(self) -> Rule:
        if self.routing_strategy == TOP_K:
            return Rule(keep="top_k", top_k=self.top_k, gate="renormalised")
        threshold = self.top_p * self.divisor
        return Rule(keep="top_p", top_p=threshold) if threshold < 1 else Rule()


class MixLora(Method[MixLoraConfig]):
    name = "mixlora"
    paper = "arXiv 2404.15159; MoE-PEFT"
    stored = "router [E, in] of an MLP, E times A [r, in], B [out, r]; attention A, B"
    checked_against = "the released code's formula"
    kinds = frozenset({"linear", "block"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MIXLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> MixLoraConfig:
        config = read_config(MixLoraConfig, raw_config)
        if config.routing_strategy not in (TOP_K, TOP_P):
            reason = _REFUSED_STRATEGIES.get(config.routing_strategy, f"expected {TOP_K!r} or {TOP_P!r}")
            raise UnsupportedMethod(
                f"MIXLORA: routing_strategy={shown(config.routing_strategy)} is not served: {reason}"
            )
        if config.routing_strategy == TOP_K:
            check_top_k("MIXLORA", "top_k", config.top_k, config.num_experts)
        if 0 < config.temperature < MIN_TEMPERATURE:
            raise InvalidConfig(
                f"adapter_config.json: temperature: found {config.temperature}, expected 0 or at least "
                f"{MIN_TEMPERATURE}"
            )
        expert_size(config)
        return config

    def compile(self, config: MixLoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = {each.site.path: each for each in moe_peft.found_in_layers(MIXTURE, tensors, sites)}
        routers = {path: _router(config, each) for path, each in found.items() if each.site.kind == "block"}
        _refuse_lone_routers(found, routers)
        last = {_last_projection(path, sites) for path in routers if config.divisor != 1}
        parts: dict[str, tuple[Part, ...]] = {}
        for path, site in sites.items():
            router = routers.get(above(path, routers) or "")
            if path in routers:
                parts[path] = (RoutedBlock(routers[path], "block"),)
            elif router is not None and (path in found or path in last):
                divisor = config.divisor if path in last else 1.0
                own = _experts(config, found[path]) if path in found else ((),) * config.num_experts
                parts[path] = (Routed(_divided(own, site, divisor), router, from_block=True),)
            elif path in found:
                parts[path] = (_plain(config, found[path]),)
        return AdapterProgram(parts)

    def reference(self, config: MixLoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = moe_peft.tensors_of_layer(MIXTURE, tensors, site, x_TI.dtype)
        if site.kind == "block":
            return _reference_gates(config, own, x_TI)
        y_TO = torch.einsum("oi,ti->to", site.weight_OI.to(x_TI.dtype), x_TI)
        if site.bias_O is not None:
            y_TO = y_TO + site.bias_O.to(x_TI.dtype)
        if FACTORS[0] in own:
            delta_OI = config.lora.scale * torch.einsum("or,ri->oi", own[FACTORS[1]], own[FACTORS[0]])
            return y_TO + torch.einsum("oi,ti->to", delta_OI, x_TI)
        block, _, name = moe_peft.in_layers(site.path).rpartition(".")
        is_divided = f"{MIXTURE}.{block}.{GATE}" in tensors and name in LAST
        t = config.divisor if is_divided else 1.0
        total_TO = y_TO + (config.num_experts * (1 / t - 1)) * y_TO
        if own:
            scale = expert_size(config).scale / t
            for delta_OI in expert_deltas(own, config.num_experts):
                total_TO = total_TO + scale * torch.einsum("oi,ti->to", delta_OI, x_TI)
        return total_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        num_experts = whole_number(2, 5, generator)
        options = moe_peft.example_options(generator)
        routing = {"routing_strategy": TOP_K, "num_experts": num_experts}
        routing |= {"top_k": whole_number(1, num_experts, generator)}
        if coin(generator):
            temperature = (0.0, 0.5, 1.5)[whole_number(0, 2, generator)]
            routing |= {"routing_strategy": TOP_P, "top_p": 0.6, "temperature": temperature}
            del routing["top_k"]
        own: dict[str, Any] = {"bias": "none", "r": 5, "lora_alpha": 3, "lora_dropout": 0.1}
        overrides = {"expert_lora": own} if coin(generator) else {}
        blocks = {path: site for path, site in sites.items() if site.kind == "block"}
        tensors: dict[str, Tensor] = {}
        chosen: list[Site] = []
        for block in chosen_sites(blocks, generator):
            tensors |= moe_peft.example_gate(MIXTURE, block, num_experts, generator)
            inner = {path: site for path, site in sites.items() if above(path, [block.path])}
            for site in chosen_sites(inner, generator):
                rank = own["r"] if overrides else options["r"]
                tensors |= moe_peft.example_experts(MIXTURE, site, num_experts, rank, generator)
                chosen.append(site)
        for site in chosen_sites(moe_peft.layers_among(sites), generator):
            if site.kind == "linear" and not above(site.path, blocks):
                tensors |= moe_peft.example_plain(MIXTURE, site, options["r"], generator)
                chosen.append(site)
        targets = moe_peft.target_names(chosen)
        return {"peft_type": "MIXLORA", **options, "target_modules": targets, **overrides, **routing}, tensors


def expert_size(config: MixLoraConfig) -> LoraSize:
    """The experts' rank and scale. Raises as `MixLora.parse` does."""
    own = read_config(ExpertLora, {"peft_type": "MIXLORA's expert_lora", **(config.expert_lora or {})})
    return moe_peft.lora_size(
        config.r if own.r is None else own.r,
        config.lora_alpha if own.lora_alpha is None else own.lora_alpha,
        config.use_rslora if own.use_rslora is None else own.use_rslora,
    )


def _router(config: MixLoraConfig, found: SiteTensors) -> Router:
    found.refuse_others((GATE,), "a block has a router alone")
    return moe_peft.router_of(found, config.num_experts, config.rule)


def _refuse_lone_routers(found: Mapping[str, SiteTensors], routers: Mapping[str, Router]) -> None:
    chosen = {above(path, routers) for path in found}
    lone = next((path for path in routers if path not in chosen), None)
    if lone is not None:
        raise InvalidTensors(f"{found[lone].name_of(GATE)} is surplus: no projection below it has experts")


def _experts(config: MixLoraConfig, found: SiteTensors) -> tuple[tuple[LowRank], ...]:
    reason = f"below a router a layer has {config.num_experts} experts and nothing else"
    found.refuse_others(expert_keys(config.num_experts), reason)
    return experts_of_one_size(found, config.num_experts, expert_size(config))


def _plain(config: MixLoraConfig, found: SiteTensors) -> LowRank:
    if GATE not in found.tensors and not any(key in found.tensors for key in FACTORS):
        expert = found.name_of(next(iter(found.tensors)))
        raise InvalidTensors(f"{GATE} is missing above {found.site.path!r}, while the file holds {expert}")
    return only_lora(found, FACTORS, config.lora)


def _last_projection(block: str, sites: Sites) -> str:
    """The layer whose output is the block's."""
    found = [path for path in (f"{block}.{name}" for name in LAST) if path in sites]
    if len(found) != 1:
        raise AdapterMismatch(
            f"a temperature that is not 0 or 1 divides the output of {block!r}, and of the layers "
            f"{', '.join(LAST)}, one of which gives it, this base has {len(found)} there, expected 1"
        )
    return found[0]


def _divided(
    experts: tuple[tuple[LowRank, ...], ...], site: Site, divisor: float
) -> tuple[tuple[LowRank | Diagonal, ...], ...]:
    """What an expert gives at a site, base included, divided by a number."""
    if divisor == 1:
        return experts
    gain = torch.full((site.out_features,), 1 / divisor, device=site.weight_OI.device)
    return tuple(
        (*(LowRank(part.a_RI, part.b_OR / divisor) for part in parts), Diagonal("output", gain))
        for parts in experts
    )


def _reference_gates(config: MixLoraConfig, own: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
    """Without the division of those of `TOP_P`, which is the last projection's."""
    if not own:
        return torch.zeros(len(x_TI), 1, dtype=x_TI.dtype)
    if config.routing_strategy == TOP_K:
        return renormalised_reference(x_TI, own[GATE], config.top_k)
    probability_TE = torch.softmax(torch.einsum("ei,ti->te", own[GATE], x_TI), dim=1)
    sorted_TE, expert_TE = (probability_TE / config.divisor).sort(dim=1, descending=True)
    before_TE = sorted_TE.cumsum(dim=1) - sorted_TE
    is_kept_TE = torch.zeros_like(before_TE, dtype=torch.bool).scatter(
        1, expert_TE, before_TE <= config.top_p
    )
    return torch.where(is_kept_TE, probability_TE, 0.0)
