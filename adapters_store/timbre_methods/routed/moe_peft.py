"""The files of MoE-PEFT, which keeps three mixtures of LoRAs in one format.

A tensor is called ``<mixture>.layers.<i>.<module>.<key>``; ``layers`` is the base's, wherever it is.
The keys, for a router of E experts::

    lora_A.weight, lora_B.weight                           a plain LoRA, where there is no mixture
    moe_gate.weight                                        R [E, I], without a bias
    experts.<e>.lora_A.weight, experts.<e>.lora_B.weight   expert e, from 0 to E - 1

MoE-PEFT writes them with ``torch.save``; ``timbre convert`` makes safetensors of that.

Legend: I in features, E experts.

Source: github.com/TUDB-Labs/MoE-PEFT, moe_peft/model.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank
from timbre_methods.contract import DERIVED, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.examples import coin, random_tensor, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.routed.blocks import block_of
from timbre_methods.routed.low_rank_experts import LoraSize, NumExperts, example_lora, expert_factors
from timbre_methods.routing import Router, Rule
from timbre_methods.site_tensors import SiteTensors, nearest_fact

GATE = "moe_gate.weight"

_NAME = re.compile(
    r"(?P<path>layers\.[0-9]+\..+?)\.(?P<key>moe_gate\.weight|(experts\.[0-9]+\.)?lora_[AB]\.weight)"
)
_LAYER = re.compile(r"(?:^|\.)(?=layers\.[0-9]+\.)")


class MoePeftConfig(PeftConfig):
    """The fields that all three have; MoE-PEFT has no defaults for them."""

    inert = frozenset(
        {
            "jitter_noise",
            "lora_dropout",
            "lora_init",
            "name",
            "router_aux_loss_coef",
            "router_init_range",
            "router_loss",
            "task_name",
        }
    )
    takes_beside = False
    reasons: ClassVar[Mapping[str, str]] = {
        "use_dora": (
            "MoE-PEFT saves no magnitudes, so that its file does not tell what was trained; "
            "train with use_dora=false"
        )
    }

    r: Rank
    lora_alpha: Finite
    use_rslora: bool = False
    num_experts: NumExperts

    @property
    def lora(self) -> LoraSize:
        return lora_size(self.r, self.lora_alpha, self.use_rslora)


def lora_size(rank: int, alpha: float, use_rslora: bool) -> LoraSize:
    return LoraSize(rank, alpha / (math.sqrt(rank) if use_rslora else rank))


def router_of(found: SiteTensors, num_experts: int, rule: Rule) -> Router:
    """The router of a layer or block. Raises `InvalidTensors`."""
    weight_EI = found.need(GATE, (num_experts, found.site.in_features))
    return Router(weight_EI.to(torch.float32, copy=True), rule)


def found_in_layers(mixture: str, tensors: Tensors, sites: Sites) -> list[SiteTensors]:
    """A file's tensors site by site, in the base's order.

    Raises `InvalidTensors` for a name of another form and for an empty file, `AdapterMismatch` for a layer
    or a block that the base lacks.
    """
    found: dict[str, dict[str, Tensor]] = {}
    start, stem = f"{mixture}.", _stem_of_layers(sites)
    for name, tensor in tensors.items():
        if name.startswith(DERIVED):
            continue
        match = _NAME.fullmatch(name.removeprefix(start)) if name.startswith(start) else None
        if match is None:
            raise InvalidTensors(
                f"{name[:200]!r} is surplus: no layer takes it; expected names like "
                f"'{start}layers.0.<module>.<key>' with one of the keys {', '.join(FACTORS)}, {GATE} and "
                f"{expert_factors(0)[0]}"
            )
        path = stem + match["path"]
        if match["key"] == GATE and path not in sites:
            block_of(name, path, sites)
        if path not in sites:
            raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")
        found.setdefault(path, {})[match["key"]] = tensor
    if not found:
        raise InvalidTensors(f"the file holds no tensor, expected some whose names begin with {start!r}")
    return [
        SiteTensors(site, found[path], stem=start + in_layers(path))
        for path, site in sites.items()
        if path in found
    ]


def in_layers(path: str) -> str:
    """``layers.0.mlp.up_proj`` of ``model.layers.0.mlp.up_proj``; empty for a module outside of layers."""
    match = _LAYER.search(path)
    return path[match.end() :] if match else ""


def _stem_of_layers(sites: Sites) -> str:
    """What stands before ``layers.<i>.`` in the base. Raises `AdapterMismatch` for none or several."""
    stems = {path.removesuffix(in_layers(path)) for path in sites if in_layers(path)}
    if len(stems) != 1:
        shown = " and ".join(repr(f"{stem}layers") for stem in sorted(stems)[:3]) or "none"
        raise AdapterMismatch(
            f"MoE-PEFT names modules below 'layers', and this base has {shown}, expected one"
        )
    return stems.pop()


def tensors_of_layer(mixture: str, tensors: Tensors, site: Site, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the file holds for this one site, by key, in a dtype. For references only."""
    start = f"{mixture}.{in_layers(site.path)}."
    return {
        name.removeprefix(start): tensor.to(dtype)
        for name, tensor in tensors.items()
        if in_layers(site.path)
        and name.startswith(start)
        and _NAME.fullmatch(name.removeprefix(f"{mixture}."))
    }


def layers_among(sites: Sites) -> dict[str, Site]:
    """Those that a file can name."""
    return {path: site for path, site in sites.items() if in_layers(path)}


def example_options(generator: torch.Generator) -> dict[str, Any]:
    """What MoE-PEFT writes of a LoRA's config."""
    options: dict[str, Any] = {
        "bias": "none",
        "lora_alpha": whole_number(1, 16, generator),
        "lora_dropout": 0.05,
        "r": whole_number(1, 4, generator),
    }
    return options | ({"use_rslora": True} if coin(generator) else {})


def example_plain(mixture: str, site: Site, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The LoRA of a layer without experts."""
    return example_lora(f"{mixture}.{in_layers(site.path)}", FACTORS, site, rank, generator)


def example_experts(
    mixture: str, site: Site, num_experts: int, rank: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """The experts of one layer."""
    stem, keys = f"{mixture}.{in_layers(site.path)}", map(expert_factors, range(num_experts))
    made = [example_lora(stem, own, site, rank, generator) for own in keys]
    return {name: tensor for each in made for name, tensor in each.items()}


def example_gate(mixture: str, site: Site, num_experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The router of one layer or block."""
    shape = (num_experts, site.in_features)
    return {f"{mixture}.{in_layers(site.path)}.{GATE}": random_tensor(shape, generator)}


def target_names(sites: Sequence[Site]) -> list[str]:
    """``target_modules`` as MoE-PEFT writes them: the last names of modules."""
    return sorted({site.path.rpartition(".")[2] for site in sites})
