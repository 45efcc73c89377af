"""From several compiled adapters to one that holds each of them as an expert: an Arrow or a LoRA-Mixer file.

An expert is its adapter's whole ΔW at a layer, its scale in B; the adapter's weight is the expert's scale. An
adapter that does not adapt a layer where others do is an expert of zeros there: Arrow gives it no row that
another can have, and a trained router whatever share of nothing it likes.

Legend: I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.low_rank.lora import scales_of
from timbre_methods.merging.changes import Ingredient, factors_at
from timbre_methods.merging.given_router import routers_of
from timbre_methods.merging.lora_file import AdapterFile, peft_config
from timbre_methods.merging.merge import Proceed, adapted_paths, check_finite
from timbre_methods.routed.lora_mixer import ROUTER_BIAS
from timbre_methods.routed.low_rank_experts import Factors, expert_factors
from timbre_methods.site_tensors import PREFIX

MAX_CELLS = 2**29
"""The most numbers of a mixture, routers apart: it is held whole until it is stored."""


def check_cells(num_cells: int) -> None:
    """Raises `InvalidRecipe` for more numbers than a mixture may have."""
    if num_cells > MAX_CELLS:
        raise InvalidRecipe(
            f"the mixture would have more than {MAX_CELLS} numbers; bind fewer adapters, or some of smaller "
            "ranks"
        )


@dataclass(frozen=True, slots=True)
class ArrowChoice:
    top_k: int
    temperature: float


@dataclass(frozen=True, slots=True)
class RouterChoice:
    top_k: int
    renormalised: bool


def bind_arrow(
    ingredients: Sequence[Ingredient],
    general: Sequence[Ingredient],
    sites: Sites,
    choice: ArrowChoice,
    proceed: Proceed = lambda: None,
) -> AdapterFile:
    """Experts that are found by their own directions; the mean of A and the mean of B of ``general`` ones, as
    their files have them, are taken from each (GenKnowSub).

    Raises `AdapterMismatch` for an adapter that cannot be an expert, and where factors cannot be subtracted:
    all then are plain LoRAs of one rank, on the same layers.
    """
    experts = _experts(ingredients, sites, proceed)
    if general:
        experts = _without_general(experts, ingredients, _experts(general, sites, proceed), general)
        _check_left(experts, ingredients)
    options = {
        "scales": [each.weight for each in ingredients],
        "top_k": choice.top_k,
        "router_temperature": choice.temperature,
        "prototypes": "svd",
    }
    return _file("ARROW", options, experts, {})


def bind_routed(
    ingredients: Sequence[Ingredient],
    router: Tensors,
    sites: Sites,
    choice: RouterChoice,
    proceed: Proceed = lambda: None,
) -> AdapterFile:
    """Experts under a trained router, whose tensors are given by the names in its file.

    Raises `AdapterMismatch` for an adapter that cannot be an expert, and `InvalidRecipe`, naming tensor and
    layer, for a router that does not fit them.
    """
    experts = _experts(ingredients, sites, proceed)
    routers = routers_of(router, experts, len(ingredients), sites)
    has_bias = any(ROUTER_BIAS in own for own in routers.values())
    if has_bias:
        routers = {p: {ROUTER_BIAS: torch.zeros(len(ingredients)), **own} for p, own in routers.items()}
    options = {
        "scales": [each.weight for each in ingredients],
        "top_k": choice.top_k,
        "renormalised": choice.renormalised,
        "routers": "projection",
        "router_bias": has_bias,
    }
    return _file("LORA_MIXER", options, experts, routers)


def _experts(ingredients: Sequence[Ingredient], sites: Sites, proceed: Proceed) -> dict[str, list[Factors]]:
    """Of each layer that any of them adapts, in model order, one for each of them."""
    paths = adapted_paths(ingredients, sites)
    for each in ingredients:
        if each.weight == 0:
            raise InvalidRecipe(f"{each.label} has the weight 0: as an expert it does nothing; leave it out")
        for path in paths:
            if path in each.program.sites and sites[path].kind != "linear":
                raise AdapterMismatch(
                    f"{each.label} ({each.method}) adapts {path}, and only linear layers have experts"
                )
    num_cells = 0
    for path in paths:  # Not all of them at once: thin cores in a wide basis take much more than their own.
        proceed()
        for each in ingredients:
            num_cells += sum(factor.numel() for factor in _expert(each, path, sites))
            check_cells(num_cells)
    found = {}
    for path in paths:
        proceed()
        found[path] = [_expert(each, path, sites) for each in ingredients]
    return found


def _expert(found: Ingredient, path: str, sites: Sites) -> Factors:
    if path in found.program.sites:
        return factors_at(found, path)
    return torch.zeros(1, sites[path].in_features), torch.zeros(sites[path].out_features, 1)


def _without_general(
    experts: Mapping[str, Sequence[Factors]],
    ingredients: Sequence[Ingredient],
    common: Mapping[str, Sequence[Factors]],
    general: Sequence[Ingredient],
) -> dict[str, list[Factors]]:
    """With each expert's scale in B, and that of the general ones taken out of ``common``, theirs."""
    found = {}
    for path in dict.fromkeys((*experts, *common)):
        together = (*ingredients, *general)
        _check_alike(together, path)
        scales = [_scale_at(each, path) for each in together]
        pairs, of_general = experts[path], scales[len(ingredients) :]
        mean_RI = torch.stack([a_RI for a_RI, _ in common[path]]).mean(0)
        bare = [b_OR / scale for (_, b_OR), scale in zip(common[path], of_general, strict=True)]
        mean_OR = torch.stack(bare).mean(0)
        check_finite(path, mean_RI, mean_OR)
        found[path] = [
            (a_RI - mean_RI, b_OR - scale * mean_OR)
            for (a_RI, b_OR), scale in zip(pairs, scales, strict=False)
        ]
    return found


def _check_left(experts: Mapping[str, Sequence[Factors]], ingredients: Sequence[Ingredient]) -> None:
    for e, each in enumerate(ingredients):
        if not any(bool(a.any()) and bool(b.any()) for a, b in (pairs[e] for pairs in experts.values())):
            raise InvalidRecipe(
                f"nothing is left of {each.label} once the general adapters are taken from it; leave it out "
                "of one of the two"
            )


def _check_alike(together: Sequence[Ingredient], path: str) -> None:
    """Factors are subtracted one by one: all need to be there, of one rank."""
    reason = "general adapters are taken from the others factor by factor"
    for each in together:
        if path not in each.program.sites:
            raise AdapterMismatch(
                f"{each.label} does not adapt {path}, as another does; {reason}, so that all must adapt the "
                "same layers"
            )
    first, *others = [(each.label, len(factors_at(each, path)[0])) for each in together]
    for label, rank in others:
        if rank != first[1]:
            raise AdapterMismatch(
                f"at {path} {first[0]} has rank {first[1]} and {label} has rank {rank}; {reason}, so that "
                "all must have one rank"
            )


def _scale_at(found: Ingredient, path: str) -> float:
    if found.method != "lora":
        raise AdapterMismatch(
            f"{found.label} is of the method {found.method}; general adapters are taken from the factors of "
            "plain LoRAs alone"
        )
    rank = len(factors_at(found, path)[0])
    scale = scales_of(found.config, {path: rank})[path]
    if scale == 0:
        raise AdapterMismatch(f"{found.label} has the scale 0 at {path}: it does nothing; leave it out")
    return scale


def _file(
    peft_type: str,
    options: Mapping[str, Any],
    experts: Mapping[str, Sequence[Factors]],
    routers: Mapping[str, Mapping[str, Tensor]],
) -> AdapterFile:
    tensors: dict[str, Tensor] = {}
    for path, pairs in experts.items():
        check_finite(path, *(factor for pair in pairs for factor in pair))
        own = {
            key: tensor
            for e, pair in enumerate(pairs)
            for key, tensor in zip(expert_factors(e), pair, strict=True)
        }
        tensors |= {f"{PREFIX}{path}.{key}": each for key, each in {**own, **routers.get(path, {})}.items()}
    return AdapterFile(peft_config(peft_type, experts, options), {n: _alone(t) for n, t in tensors.items()})


def _alone(tensor: Tensor) -> Tensor:
    """Float32, contiguous and in storage of its own, as a file wants it."""
    found = tensor.float().contiguous()
    return found if found.untyped_storage().nbytes() == found.nbytes else found.clone()
