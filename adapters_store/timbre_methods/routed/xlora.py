"""X-LoRA: LoRAs as experts, whose gates come from what the base alone makes of each token.

    z = classifier(h),  g = softmax(z / softmax_temperature) or z,  y = W x + b + w Σ_e g_e s_e B_e A_e x

h is the base's last hidden state of the token, after the final norm, in a pass without the adapter. The
classifier has ``xlora_depth`` linear layers with ReLU between them and gives one g for all layers or, with
``layerwise_scalings``, one for each, in the base's order. ``top_k_lora`` keeps the largest g and does not
divide them by their sum; with ``enable_softmax_topk`` those that are left become their softmax. w is
``global_scaling_weight``.

PEFT writes a classifier and says where the experts' folders were; here ``adapters`` holds their configs and
one file all tensors, so that an adapter is whole. PEFT numbers the classifier's layers with ReLU and dropout
among them, so that they lie two or three apart.

Legend: I in features, O out features, R rank, E experts, L adapted layers.

Paper: arXiv 2402.07148 section 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, Finite, PeftConfig, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.lora import (
    FACTORS,
    LoraConfig,
    read_factors,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.routed.low_rank_experts import (
    NumExperts,
    check_top_k,
    example_experts,
    expert_keys,
    plain_output,
    reference_deltas,
)
from timbre_methods.routing import MAX_EXPERTS, Routed, Rule, Scout, Scouted
from timbre_methods.site_tensors import SiteTensors, check_tensor, tensors_by_site

MAX_SCOUT_FEATURES = 2**14
"""Of a layer of the classifier: a few megabytes of file could else make a step of any size."""
CLASSIFIER = "base_model.internal_xlora_classifier.layers."
_DROPPED = (
    "; PEFT leaves a classifier's layer out of the file where its number is an expert's name: save the "
    "internal_xlora_classifier's own state_dict under these names"
)


class XLoraExpert(LoraConfig):
    """An expert's own config."""

    takes_beside = False
    reasons: ClassVar[Mapping[str, str]] = {"use_dora": "X-LoRA has no DoRA experts"}


class XLoraConfig(PeftConfig):
    """The defaults are PEFT's."""

    takes_beside = False
    inert = frozenset({"use_trainable_adapters", "xlora_dropout_p"})
    reasons: ClassVar[Mapping[str, str]] = {
        "scaling_pass_value": "the first pass is the base alone here; train with 0"
    }

    hidden_size: Count
    adapters: Annotated[dict[str, dict[str, Any] | str], Field(min_length=1, max_length=MAX_EXPERTS)]
    enable_softmax: bool = True
    enable_softmax_topk: bool = False
    layerwise_scalings: bool = False
    xlora_depth: Annotated[int, Field(ge=1, le=64)] = 1
    xlora_size: Count = 2048
    softmax_temperature: Annotated[float, Field(allow_inf_nan=False, ge=1e-6, le=1e6)] = 1.0
    top_k_lora: NumExperts | None = None
    global_scaling_weight: Finite = 1.0


class XLora(Method[XLoraConfig]):
    name = "xlora"
    paper = "arXiv 2402.07148"
    stored = "of each expert A [r, in] and B [out, r]; a classifier of the base's last hidden state"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "XLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> XLoraConfig:
        config = read_config(XLoraConfig, raw_config)
        experts_of(config)
        check_top_k("XLORA", "top_k_lora", config.top_k_lora or 1, len(config.adapters))
        return config

    def compile(self, config: XLoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        experts, names = experts_of(config), _classifier_names(config, tensors)
        kinds = [_Expert(each, PathPatterns("alpha_pattern", each.alpha_pattern or {})) for each in experts]
        found = list(tensors_by_site(tensors, sites, expert_keys(len(experts)), beside=names))
        num_places = len(found) if config.layerwise_scalings else 1
        scout = _scout(config, tensors, names, num_places * len(experts))
        places = [Scouted(len(experts), place) for place in range(num_places)]
        weight = config.global_scaling_weight
        routed = {
            each.site.path: Routed(
                tuple(kind.parts(each, e, weight) for e, kind in enumerate(kinds)),
                places[number % num_places],
            )
            for number, each in enumerate(found)
        }
        for e in range(len(experts)):
            if not any(part.experts[e] for part in routed.values()):
                raise InvalidTensors(f"expert {e} has no tensor in the file, though adapters has its config")
        return AdapterProgram({path: (part,) for path, part in routed.items()}, scout=scout)

    def reference(self, config: XLoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO, experts = plain_output(site, x_TI), experts_of(config)
        for e, expert in enumerate(experts):
            own = {
                name.replace(f".experts.{e}.", ".experts.0."): tensor
                for name, tensor in tensors.items()
                if f".experts.{e}." in name
            }
            for delta_OI in reference_deltas(own, site, 1, x_TI.dtype):
                rank = own[f"base_model.model.{site.path}.experts.0.{FACTORS[0]}"].shape[0]
                s = config.global_scaling_weight * reference_scale(expert, site, rank)
                y_TO = y_TO + s * torch.einsum("oi,ti->to", delta_OI, x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, num_experts = chosen_sites(sites, generator), whole_number(2, 3, generator)
        hidden, width, depth = 12, whole_number(4, 6, generator), whole_number(1, 3, generator)
        is_layerwise, stride = coin(generator), whole_number(2, 3, generator)
        tensors: dict[str, Tensor] = {}
        for site in chosen:
            tensors |= example_experts(site, num_experts, generator, rank=2)
        outputs = num_experts * (len(chosen) if is_layerwise else 1)
        sizes = [hidden, *[width] * (depth - 1), outputs]
        for number in range(depth):
            stem = f"{CLASSIFIER}{stride * number}."
            tensors[stem + "weight"] = random_tensor((sizes[number + 1], sizes[number]), generator)
            tensors[stem + "bias"] = random_tensor((sizes[number + 1],), generator)
        options = {
            "hidden_size": hidden,
            "adapters": {str(e): _example_expert(e, generator) for e in range(num_experts)},
            "enable_softmax": coin(generator),
            "enable_softmax_topk": coin(generator),
            "layerwise_scalings": is_layerwise,
            "xlora_depth": depth,
            "xlora_size": width,
            "xlora_dropout_p": 0.2 if stride == 3 else 0.0,
            "use_trainable_adapters": False,
            "softmax_temperature": whole_number(1, 8, generator) / 2,
            "top_k_lora": 2 if coin(generator) else None,
            "scaling_pass_value": 0.0,
            "global_scaling_weight": whole_number(1, 8, generator) / 2,
        }
        return peft_file("XLORA", chosen, options), tensors


def experts_of(config: XLoraConfig) -> list[XLoraExpert]:
    """The experts' configs by their numbers. Raises as `XLora.parse` does."""
    numbers = [str(e) for e in range(len(config.adapters))]
    stray = next((name for name in config.adapters if name not in numbers), None)
    if stray is not None:
        raise InvalidConfig(
            f"XLORA: adapters: found the name {shown(stray)}, expected the numbers 0 to {numbers[-1]}"
        )
    return [_expert_of(number, config.adapters[number]) for number in numbers]


def _expert_of(number: str, raw: Mapping[str, Any] | str) -> XLoraExpert:
    if isinstance(raw, str):
        raise InvalidConfig(
            f"XLORA: adapters: expert {number} is the path {shown(raw)}, expected its adapter_config.json: "
            "pack the folder and those of its experts with timbre_client.export.xlora"
        )
    if raw.get("peft_type") != "LORA":
        raise InvalidConfig(
            f"XLORA: adapters: expert {number}: peft_type: found {shown(raw.get('peft_type'))}, "
            "expected 'LORA'"
        )
    try:
        expert = read_lora_config(XLoraExpert, raw)
    except (InvalidConfig, UnsupportedMethod) as error:
        raise type(error)(f"XLORA: adapters: expert {number}: {error}") from None
    if expert.lora_bias:
        raise UnsupportedMethod(
            f"XLORA: adapters: expert {number}: lora_bias is on and is not served: no gate multiplies it"
        )
    return expert


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert's config, ready for its layers."""

    config: XLoraExpert
    alphas: PathPatterns

    def parts(self, found: SiteTensors, number: int, weight: float) -> tuple[LowRank, ...]:
        """What it adds at a site with gate 1; nothing at a layer that it was not trained on."""
        stem = f"experts.{number}"
        own = {key: found.tensors[f"{stem}.{key}"] for key in FACTORS if f"{stem}.{key}" in found.tensors}
        if not own:
            return ()
        a_RI, b_OR = read_factors(self.config, SiteTensors(found.site, own, stem=found.name_of(stem)))
        s = weight * scale(self.config, self.alphas, found.site.path, a_RI.shape[0])
        return (LowRank(a_RI.to(torch.float32, copy=True), b_OR.to(torch.float32) * s),)


def _classifier_names(config: XLoraConfig, tensors: Tensors) -> list[str]:
    """The names of the classifier's weights and biases, layer by layer. Raises `InvalidTensors`."""
    apart = 2 if any(name.startswith(f"{CLASSIFIER}2.") for name in tensors) else 3
    layers = [f"{CLASSIFIER}{apart * number}." for number in range(config.xlora_depth)]
    names = [layer + key for layer in layers for key in ("weight", "bias")]
    missing = next((name for name in names if name not in tensors), None)
    if missing is not None:
        raise InvalidTensors(f"{missing} is missing, one of {config.xlora_depth} layers{_DROPPED}")
    return names


def _scout(config: XLoraConfig, tensors: Tensors, names: Sequence[str], num_outputs: int) -> Scout:
    sizes = [config.hidden_size, *[config.xlora_size] * (config.xlora_depth - 1), num_outputs]
    widest = max(sizes[1:])
    if widest > MAX_SCOUT_FEATURES:
        raise UnsupportedMethod(
            f"XLORA: a layer of the classifier has {widest} outputs, at most {MAX_SCOUT_FEATURES} are "
            "served: each token of a step takes as many numbers"
        )
    weights, biases = names[::2], names[1::2]
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_tensor(weight, tensors[weight], (sizes[number + 1], sizes[number]))
        check_tensor(bias, tensors[bias], (sizes[number + 1],))
    keep: Literal["all", "top_k"] = "all" if config.top_k_lora is None else "top_k"
    rule = Rule(
        scale=1 / config.softmax_temperature if config.enable_softmax else 1.0,
        keep=keep,
        top_k=config.top_k_lora or 1,
        gate="softmax" if config.enable_softmax else "logit",
        again=config.enable_softmax_topk,
    )
    return Scout(
        tuple(tensors[name].to(torch.float32, copy=True) for name in weights),
        tuple(tensors[name].to(torch.float32, copy=True) for name in biases),
        rule,
        len(config.adapters),
    )


def _example_expert(number: int, generator: torch.Generator) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": whole_number(1, 8, generator),
        "use_rslora": number == 1,
        "lora_dropout": 0.1,
        "bias": "none",
        "use_dora": False,
        "target_modules": ["q_proj"],
    }
