"""From several compiled adapters to one that holds each of them as an expert: an Arrow or a LoRA-Mixer file.

An expert is its adapter's whole ΔW at a layer, its scale in B; the adapter's weight is the expert's scale. An
adapter that does not adapt a layer where others do is an expert of zeros there: Arrow gives it no row that
another can have, and a trained router whatever share of nothing it likes.

A trained router is a file of its own, of linear layers with a row for each adapter. Their names are paths:
``router.weight`` [E, in] and, where it has one, ``router.bias`` [E] are those of every layer that has no
nearer one, and ``<module>.router.weight`` those of all below that module. Each layer's router reads the
layer's own input.

Legend: I in features, O out features, R rank, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidRecipe, InvalidTensors
from timbre_methods.low_rank.lora import scales_of
from timbre_methods.merging.changes import Ingredient, factors_at
from timbre_methods.merging.lora_file import AdapterFile, peft_config
from timbre_methods.merging.merge import adapted_paths, check_finite
from timbre_methods.routed.lora_mixer import ROUTER, ROUTER_BIAS
from timbre_methods.routed.low_rank_experts import Factors, expert_factors
from timbre_methods.site_tensors import PREFIX, check_tensor, nearest_fact

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


def bind_arrow(
    ingredients: Sequence[Ingredient], general: Sequence[Ingredient], sites: Sites, choice: ArrowChoice
) -> AdapterFile:
    """Experts that are found by their own directions; the mean of A and the mean of B of ``general`` ones, as
    their files have them, are taken from each (GenKnowSub).

    Raises `AdapterMismatch` for an adapter that cannot be an expert, and where factors cannot be subtracted:
    all then are plain LoRAs of one rank, on the same layers.
    """
    experts = _experts(ingredients, sites)
    if general:
        experts = _without_general(experts, ingredients, general, sites)
    options = {
        "scales": [each.weight for each in ingredients],
        "top_k": choice.top_k,
        "router_temperature": choice.temperature,
        "prototypes": "svd",
    }
    return _file("ARROW", options, experts, {})


def bind_routed(
    ingredients: Sequence[Ingredient], router: Tensors, sites: Sites, *, top_k: int, renormalised: bool
) -> AdapterFile:
    """Experts under a trained router, whose tensors are given by the names in its file.

    Raises `AdapterMismatch` for an adapter that cannot be an expert, and `InvalidRecipe`, naming tensor and
    layer, for a router that does not fit them.
    """
    experts = _experts(ingredients, sites)
    routers = _routers(router, experts, len(ingredients), sites)
    has_bias = any(ROUTER_BIAS in own for own in routers.values())
    if has_bias:
        routers = {p: {ROUTER_BIAS: torch.zeros(len(ingredients)), **own} for p, own in routers.items()}
    options = {
        "scales": [each.weight for each in ingredients],
        "top_k": top_k,
        "renormalised": renormalised,
        "routers": "projection",
        "router_bias": has_bias,
    }
    return _file("LORA_MIXER", options, experts, routers)


def _experts(ingredients: Sequence[Ingredient], sites: Sites) -> dict[str, list[Factors]]:
    """Of each layer that any of them adapts, in model order, one for each of them."""
    paths = adapted_paths(ingredients, sites)
    for each in ingredients:
        for path in paths:
            if path in each.program.sites and sites[path].kind != "linear":
                raise AdapterMismatch(
                    f"{each.label} ({each.method}) adapts {path}, and only linear layers have experts"
                )
    num_cells = 0
    for path in paths:  # Not all of them at once: thin cores in a wide basis take much more than their own.
        for each in ingredients:
            num_cells += sum(factor.numel() for factor in _expert(each, path, sites))
            check_cells(num_cells)
    return {path: [_expert(each, path, sites) for each in ingredients] for path in paths}


def _expert(found: Ingredient, path: str, sites: Sites) -> Factors:
    if path in found.program.sites:
        return factors_at(found, path)
    return torch.zeros(1, sites[path].in_features), torch.zeros(sites[path].out_features, 1)


def _without_general(
    experts: Mapping[str, Sequence[Factors]],
    ingredients: Sequence[Ingredient],
    general: Sequence[Ingredient],
    sites: Sites,
) -> dict[str, list[Factors]]:
    """With each expert's scale in B, and that of the general ones taken out of theirs."""
    found = {}
    common = _experts(general, sites)
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


def _routers(
    router: Tensors, experts: Mapping[str, object], num_experts: int, sites: Sites
) -> dict[str, dict[str, Tensor]]:
    """The router of each layer, by key. Raises `InvalidRecipe`."""
    owners = _owners(router, experts, sites)
    unused, found = set(router), {}
    for path in experts:
        owner = _nearest(path, owners)
        if owner is None:
            raise InvalidRecipe(
                f"the router's file has no router for {path}, which the adapters change; give it "
                f"'{path}.{ROUTER}', or '{ROUTER}' for all layers that have no nearer one"
            )
        names = {key: _name(owner, key) for key in (ROUTER, ROUTER_BIAS)}
        found[path] = {key: router[name].clone() for key, name in names.items() if name in router}
        unused -= set(names.values())
        _check_shapes(names, found[path], num_experts, sites[path])
    if unused:
        raise InvalidRecipe(
            f"the router's file has {min(unused)}, but each layer below has a nearer router; leave it out"
        )
    return found


def _owners(router: Tensors, experts: Mapping[str, object], sites: Sites) -> set[str]:
    """The modules that the file has routers for."""
    owners = set()
    for name in router:
        owner = _owner(name)
        if owner and not any(path == owner or path.startswith(f"{owner}.") for path in experts):
            is_known = any(path == owner or path.startswith(f"{owner}.") for path in sites)
            fact = "none of the adapters changes a layer there" if is_known else nearest_fact(owner, sites)
            raise InvalidRecipe(f"the router's file has {name}, but {fact}")
        if _name(owner, ROUTER) not in router:
            raise InvalidRecipe(f"the router's file has {name}, but no {_name(owner, ROUTER)}")
        owners.add(owner)
    return owners


def _owner(name: str) -> str:
    """The module whose layers a tensor of the router's file is for; empty for all."""
    for key in (ROUTER, ROUTER_BIAS):
        if name == key or name.endswith(f".{key}"):
            return name.removesuffix(key).removesuffix(".")
    raise InvalidRecipe(
        f"the router's file has {name[:200]!r}; expected '{ROUTER}' and '{ROUTER_BIAS}', each alone or after "
        "the path of a layer or of a module around it"
    )


def _name(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _nearest(path: str, owners: set[str]) -> str | None:
    while path not in owners:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _check_shapes(names: Mapping[str, str], own: Mapping[str, Tensor], num_experts: int, site: Site) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        ROUTER: (num_experts, site.in_features),
        ROUTER_BIAS: (num_experts,),
    }
    for key, tensor in own.items():
        try:
            check_tensor(names[key], tensor, shapes[key])
        except InvalidTensors as error:
            raise InvalidRecipe(
                f"the router's file: {error}: a row for each of the {num_experts} parents, as wide as the "
                f"input of {site.path}"
            ) from error


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
