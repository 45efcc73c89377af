"""Uni-LoRA, as PEFT saves it: LoRA whose factors are entries of one short vector, ``y = W x + b + B A x``.

``A = θ[i_A] ∘ s_A`` and ``B = θ[i_B] ∘ s_B``, θ of the whole model. Without ``save_indices`` the file holds θ
alone. Then the layers are those that ``target_modules`` names and ``modules_to_save`` does not, and the
indices are dealt out to their A and B in the model's order: each of θ's entries equally often (the rest
drawn), then shuffled, with numpy's generator of ``proj_seed``; ``s = 1 / sqrt(how often the entry is used)``,
rounded to the base's dtype. numpy does not promise the same stream in all versions, so the indices are
derived once, at registration.

Legend: T tokens, I in features, O out features, R rank, D length of θ.

Paper: arXiv 2506.00799 section 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, Rank, Seed, is_on, read_config, shown
from timbre_methods.contract import DERIVED, Method, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.patterns import Accepts, full_match
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import (
    PREFIX,
    SiteTensors,
    check_tensor,
    derived_name,
    derived_of_site,
    tensors_by_site,
    tensors_of_site,
)

THETA = "base_model.unilora_theta_d"
SCALES = DERIVED + "unilora_scales"
INDICES_A, INDICES_B = "unilora_indices_A", "unilora_indices_B"
SCALES_A, SCALES_B = "unilora_scales_A", "unilora_scales_B"
KEYS = frozenset({INDICES_A, INDICES_B, SCALES_A, SCALES_B})
INTEGERS = (torch.int64, torch.int32)

MAX_DEALT = 2**27
"""The most indices that are dealt out for one adapter: they need 1 GiB on the way."""

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]{1,512}", re.ASCII)

Names = list[Annotated[str, Field(max_length=512)]] | Annotated[str, Field(max_length=512)]


LayerNumber = Annotated[int, Field(ge=0, le=2**31 - 1)]
Saved = Annotated[list[str], Field(max_length=1024)]


class UniloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_theta_d_bound", "init_weights", "layers_pattern", "unilora_dropout"})

    r: Rank = 4
    proj_seed: Seed = 42
    theta_d_length: Count = 256
    save_indices: bool = False
    target_modules: Names | None = None
    layers_to_transform: Annotated[list[LayerNumber], Field(max_length=4096)] | LayerNumber | None = None
    modules_to_save: Annotated[
        Saved | None, BeforeValidator(lambda given: given if is_on(given) else None)
    ] = None


class Unilora(Method[UniloraConfig]):
    name = "unilora"
    paper = "arXiv 2506.00799"
    stored = "θ once for all layers; indices and scales of A [r, in], B [out, r], or not"
    regenerated = "indices and scales, from the seed, with save_indices=false"
    checked_against = "PEFT"
    derivation = 2  # 1 numbered the layers in the order of the base's calls.

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "UNILORA"

    def parse(self, raw_config: Mapping[str, Any]) -> UniloraConfig:
        config = read_config(UniloraConfig, raw_config)
        if not config.save_indices and config.layers_to_transform not in (None, []):
            raise UnsupportedMethod(
                "UNILORA: the option 'layers_to_transform' is on and is not served without the indices: save "
                "with save_indices=true, or name the modules in target_modules"
            )
        return config

    def derive(self, config: UniloraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        if _is_saved(config, tensors):
            return {}
        targets = _targets(config, sites)
        sizes = [config.r * size for site in targets for size in (site.in_features, site.out_features)]
        dealt, scales_D = _dealt(config, sizes, targets[0].weight_OI.device)
        derived = {SCALES: scales_D}
        for site, of_a, of_b in zip(targets, dealt[::2], dealt[1::2], strict=True):
            derived[derived_name(site.path, INDICES_A)] = of_a.view(config.r, site.in_features)
            derived[derived_name(site.path, INDICES_B)] = of_b.view(site.out_features, config.r)
        return derived

    def compile(self, config: UniloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        if THETA not in tensors:
            raise InvalidTensors(f"{THETA} is missing")
        check_tensor(THETA, tensors[THETA], (config.theta_d_length,))
        theta_D = tensors[THETA].to(torch.float32)
        if config.save_indices and set(tensors) == {THETA}:
            raise InvalidTensors(f"...{INDICES_A} is missing, while the config says save_indices=true")
        if _is_saved(config, tensors):
            by_site = tensors_by_site(tensors, sites, KEYS, beside=(THETA,))
            return AdapterProgram(
                {found.site.path: (_as_saved(config, theta_D, found),) for found in by_site}
            )
        return AdapterProgram(
            {site.path: (_as_dealt(theta_D, tensors, site),) for site in _targets(config, sites)}
        )

    def check_values(self, config: UniloraConfig, tensors: Tensors, sites: Sites) -> None:
        if not _is_saved(config, tensors):
            return
        for found in tensors_by_site(tensors, sites, KEYS, beside=(THETA,)):
            for key in (INDICES_A, INDICES_B):
                low, high = (int(value) for value in found.tensors[key].aminmax())
                if low < 0 or high >= config.theta_d_length:
                    raise InvalidTensors(
                        f"{found.name_of(key)}: found indices {low} to {high}, "
                        f"expected 0 to {config.theta_d_length - 1}"
                    )

    def reference(self, config: UniloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI, theta_D = site.weight_OI.to(x_TI.dtype), tensors[THETA].to(x_TI.dtype)
        own = {**tensors_of_site(tensors, site, KEYS), **derived_of_site(tensors, site.path)}
        if own and SCALES in tensors:
            every = [t.flatten() for name, t in tensors.items() if "unilora_indices" in name]
            times_D = torch.bincount(torch.cat(every), minlength=len(theta_D))
            scale_D = times_D.float().rsqrt().to(site.weight_OI.dtype)
            own |= {SCALES_A: scale_D[own[INDICES_A].long()], SCALES_B: scale_D[own[INDICES_B].long()]}
        if own:
            a_RI = theta_D[own[INDICES_A].long()] * own[SCALES_A].to(x_TI.dtype)
            b_OR = theta_D[own[INDICES_B].long()] * own[SCALES_B].to(x_TI.dtype)
            weight_OI = weight_OI + torch.einsum("or,ri->oi", b_OR, a_RI)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        rank, length, is_saved = whole_number(1, 4, generator), whole_number(3, 9, generator), coin(generator)
        options = {
            "r": rank,
            "theta_d_length": length,
            "proj_seed": whole_number(0, 1000, generator),
            "save_indices": is_saved,
            "unilora_dropout": 0.0,
            "init_theta_d_bound": 0.02,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        # Of equal scale, so that the indices that nobody uses do not hide.
        tensors = {THETA: 1 + random_tensor((length,), generator)}
        for site in chosen if is_saved else ():
            stem = PREFIX + site.path
            shapes = (rank, site.in_features), (site.out_features, rank)
            for side, shape in zip("AB", shapes, strict=True):
                indices = torch.randint(0, length, shape, generator=generator)
                tensors[f"{stem}.unilora_indices_{side}"] = indices
                tensors[f"{stem}.unilora_scales_{side}"] = 0.5 + torch.rand(shape, generator=generator)
        return peft_file("UNILORA", chosen, options), tensors


def _is_saved(config: UniloraConfig, tensors: Tensors) -> bool:
    """Whether the file holds more than θ; what it should not hold is then refused by name."""
    return config.save_indices or any(name != THETA and not name.startswith(DERIVED) for name in tensors)


def _targets(config: UniloraConfig, sites: Sites) -> list[Site]:
    """The layers that PEFT finds by the config, in the model's order."""
    wanted = config.target_modules
    if not wanted:
        raise InvalidConfig(
            "adapter_config.json: target_modules: expected names, as the indices are not saved"
        )
    is_wanted, is_saved_whole = _names(wanted), _saved_whole(config.modules_to_save or [])
    found = [site for site in sites.values() if is_wanted(site.path) and not is_saved_whole(site.path)]
    if not found:
        raise AdapterMismatch(f"this base has no linear layer that target_modules names: {str(wanted)[:200]}")
    return found


def _names(names: list[str] | str) -> Accepts:
    """A list holds whole paths or their ends, a string is an expression for the whole path."""
    if isinstance(names, str):
        return full_match("target_modules", names)
    whole, ends = frozenset(names), tuple(f".{name}" for name in names)
    return lambda path: path in whole or path.endswith(ends)


def _saved_whole(names: list[str]) -> Accepts:
    """Whether a path is in a module that ``modules_to_save`` names: such a one has no adapter, whatever else
    names it. PEFT reads a name as an expression for whole steps of a path; plain names are served, in which a
    dot stands for any character."""
    odd = next((name for name in names if not _PLAIN_NAME.fullmatch(name)), None)
    if odd is not None:
        raise InvalidConfig(
            f"adapter_config.json: modules_to_save: found {shown(odd)}, expected names of modules of at most "
            "512 characters, as the indices are not saved"
        )
    steps = [re.compile(rf"(?:^|\.){name}(?:\.|$)") for name in names]
    return lambda path: any(each.search(path) for each in steps)


def _dealt(
    config: UniloraConfig, sizes: list[int], device: torch.device
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The indices for each factor, int32, and each entry's scale, float32; on meta nothing is drawn."""
    total, length = sum(sizes), config.theta_d_length
    if max(total, length) > MAX_DEALT:
        raise InvalidConfig(
            f"{total} indices into {length} entries are not dealt out, the limit is {MAX_DEALT}: "
            "save the adapter with save_indices=true"
        )
    if device.type == "meta":
        empty = torch.empty(total, dtype=torch.int32, device=device)
        return empty.split_with_sizes(sizes), torch.empty(length, device=device)
    generator = np.random.default_rng(config.proj_seed)
    dealt = np.repeat(np.arange(length), total // length)
    rest = generator.choice(length, size=total % length, replace=False) if total % length else dealt[:0]
    dealt = np.concatenate([dealt, rest])
    times_D = torch.from_numpy(np.bincount(dealt, minlength=length)).float()
    generator.shuffle(dealt)
    scales_D = torch.where(times_D > 0, times_D.rsqrt(), 0.0)
    return tuple(i.clone() for i in torch.from_numpy(dealt).int().split_with_sizes(sizes)), scales_D


def _as_saved(config: UniloraConfig, theta_D: Tensor, found: SiteTensors) -> LowRank:
    site = found.site
    factors = []
    for indices, scales, shape in (
        (INDICES_A, SCALES_A, (config.r, site.in_features)),
        (INDICES_B, SCALES_B, (site.out_features, config.r)),
    ):
        entries = theta_D[found.need(indices, shape, INTEGERS).long()]
        factors.append(entries * found.need(scales, shape).to(torch.float32))
    return LowRank(a_RI=factors[0], b_OR=factors[1])


def _as_dealt(theta_D: Tensor, tensors: Tensors, site: Site) -> LowRank:
    scales_D = tensors[SCALES].to(site.weight_OI.dtype).to(torch.float32)
    own = derived_of_site(tensors, site.path)
    scaled_D = theta_D * scales_D
    return LowRank(a_RI=scaled_D[own[INDICES_A].long()], b_OR=scaled_D[own[INDICES_B].long()])
