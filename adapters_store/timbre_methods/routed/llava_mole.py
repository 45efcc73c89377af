"""LLaVA-MoLE's language model: in each MLP a router chooses among E LoRAs at its three projections.

The router reads the MLP's input, p = softmax(R x + c), and is the same for all three:

* ``sparse``, the paper's: ``y = W x + b + s B_e (A_e x)`` with the e of the largest p, without p as a factor;
* ``dense``, what its released script runs: ``y = W x + b + Σ_e p_e s B_e (A_e x)`` at each projection, so
  that its experts meet before the activation.

Attention has plain LoRAs, ``y = W x + b + s B (A x)``; ``s`` is ``lora_alpha / r``.

The released checkpoint is a whole multimodal model with no config. Of that this reads the language model's
adapter tensors alone, and a config that says what the checkpoint does not; FORMAT.md has both.

Legend: T tokens, I in features, O out features, E experts.

Paper: arXiv 2401.16160; code: github.com/forwchen/LLaVA-MoLE, moe.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import DERIVED, Method, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, random_tensor, whole_number
from timbre_methods.low_rank.lora import FACTORS
from timbre_methods.program import AdapterProgram, Part
from timbre_methods.routed.blocks import above, block_of
from timbre_methods.routed.low_rank_experts import (
    Keys,
    LoraSize,
    example_lora,
    experts_of_one_size,
    only_lora,
)
from timbre_methods.routing import MAX_EXPERTS, Routed, RoutedBlock, Router, Rule
from timbre_methods.site_tensors import PREFIX, SiteTensors, nearest_fact

LORAS: tuple[Keys, ...] = (
    ("lora_A.default.weight", "lora_B.default.weight"),
    FACTORS,
)
"""In a checkpoint, whose model has named its one adapter, and in a file of PEFT's."""

_ROUTER = re.compile(r"(?P<block>.+)\.(?P<key>router\.(weight|bias))")
_EXPERT = re.compile(r"(?P<block>.+)\.moe_(?P<name>gate|up|down)\.(?P<key>(0|[1-9][0-9]{0,3})\.lora_[AB])")
_NUMBERED = re.compile(r"[0-9]+\.")
_LORA = re.compile(r"(?P<layer>.+?)\.(?P<key>lora_[AB](\.default)?\.weight)")

_ADAPTER_ALONE = (
    "expected the language model's adapter tensors alone: make the file with timbre convert, which has "
    "--strip-prefix for what stands before 'base_model.model.' and --keep for '*.router.*' and '*.lora_*'"
)


class LlavaMoleConfig(PeftConfig):
    takes_beside = False

    r: Rank
    lora_alpha: Finite
    mode: Literal["sparse", "dense"]

    @property
    def lora(self) -> LoraSize:
        return LoraSize(self.r, self.lora_alpha / self.r)

    @property
    def rule(self) -> Rule:
        return Rule(keep="top_k", top_k=1, gate="one") if self.mode == "sparse" else Rule()


class LlavaMole(Method[LlavaMoleConfig]):
    name = "llava_mole"
    paper = "arXiv 2401.16160"
    stored = "router [E, in], [E] of an MLP, E times A [r, in], B [out, r]; attention A, B"
    checked_against = "the released code's formula"
    kinds = frozenset({"linear", "block"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LLAVA_MOLE"

    def parse(self, raw_config: Mapping[str, Any]) -> LlavaMoleConfig:
        return read_config(LlavaMoleConfig, raw_config)

    def compile(self, config: LlavaMoleConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = _found(tensors, sites)
        routers = {block: _router(config, block, num, found) for block, num in _num_experts(found).items()}
        parts: dict[str, tuple[Part, ...]] = {}
        for path in (path for path in sites if path in found):
            router = routers.get(above(path, routers) or "")
            if path in routers:
                parts[path] = (RoutedBlock(routers[path], "sites"),)
            elif router is not None:
                parts[path] = (_mixture(config, found[path], router),)
            else:
                parts[path] = (only_lora(found[path], _lora_keys(found[path].tensors), config.lora),)
        return AdapterProgram(parts)

    def reference(self, config: LlavaMoleConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = {
            name.removeprefix(f"{PREFIX}{site.path}."): t.to(x_TI.dtype)
            for name, t in tensors.items()
            if name.startswith(f"{PREFIX}{site.path}.")
        }
        if site.kind == "block":
            return _reference_gates(config, own, x_TI)
        y_TO = torch.einsum("oi,ti->to", site.weight_OI.to(x_TI.dtype), x_TI)
        if site.bias_O is not None:
            y_TO = y_TO + site.bias_O.to(x_TI.dtype)
        block, _, projection = site.path.rpartition(".")
        stem = f"{PREFIX}{block}.moe_{projection.removesuffix('_proj')}."
        pairs = [(name, name.replace("lora_A", "lora_B")) for name in tensors if "lora_A" in name]
        for name_a, name_b in pairs:
            if name_a.startswith((stem, f"{PREFIX}{site.path}.lora_A")):
                a_RI, b_OR = tensors[name_a].to(x_TI.dtype), tensors[name_b].to(x_TI.dtype)
                scale = config.lora_alpha / config.r
                y_TO = y_TO + scale * torch.einsum("or,ri,ti->to", b_OR, a_RI, x_TI)
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        num_experts, r = whole_number(2, 4, generator), whole_number(1, 4, generator)
        blocks = {path: site for path, site in sites.items() if site.kind == "block"}
        tensors: dict[str, Tensor] = {}
        for block in chosen_sites(blocks, generator):
            stem = f"{PREFIX}{block.path}.router"
            tensors[f"{stem}.weight"] = random_tensor((num_experts, block.in_features), generator)
            tensors[f"{stem}.bias"] = random_tensor((num_experts,), generator)
            names = {f"{block.path}.{name}_proj": name for name in ("gate", "up", "down")}
            for site in chosen_sites({path: sites[path] for path in names if path in sites}, generator):
                for e in range(num_experts):
                    stem = f"{PREFIX}{block.path}.moe_{names[site.path]}"
                    tensors |= example_lora(stem, _expert_keys(e), site, r, generator)
        keys = LORAS[whole_number(0, 1, generator)]
        for site in chosen_sites(sites, generator):
            if site.kind == "linear" and not above(site.path, blocks):
                tensors |= example_lora(PREFIX + site.path, keys, site, r, generator)
        return {
            "peft_type": "LLAVA_MOLE",
            "base_model_name_or_path": "tiny",
            "lora_alpha": whole_number(1, 16, generator),
            "mode": "sparse" if coin(generator) else "dense",
            "r": r,
        }, tensors


def _found(tensors: Tensors, sites: Sites) -> dict[str, SiteTensors]:
    """The file's tensors by site. Raises as `Method.compile` does."""
    found: dict[str, dict[str, Tensor]] = {}
    stems: dict[str, str] = {}
    for name, tensor in tensors.items():
        if name.startswith(DERIVED):
            continue
        path, stem, key = _place(name, sites)
        if stems.setdefault(path, stem) != stem:
            raise InvalidTensors(f"{name[:200]} is surplus: the file has {stems[path]}.* for the same layer")
        found.setdefault(path, {})[key] = tensor
    if not found:
        raise InvalidTensors("the file holds no tensor, expected at least one adapted layer")
    return {path: SiteTensors(sites[path], own, stem=stems[path]) for path, own in found.items()}


def _place(name: str, sites: Sites) -> tuple[str, str, str]:
    """The site of a tensor, what its name begins with, and its key."""
    rest = name.removeprefix(PREFIX)
    if rest != name:
        if match := _ROUTER.fullmatch(rest):
            return block_of(name, match["block"], sites).path, PREFIX + match["block"], match["key"]
        if match := _EXPERT.fullmatch(rest):
            block = block_of(name, match["block"], sites).path
            path, stem, key = f"{block}.{match['name']}_proj", f"{block}.moe_{match['name']}", match["key"]
        elif match := _LORA.fullmatch(rest):
            path, stem, key = match["layer"], match["layer"], match["key"]
        else:
            raise InvalidTensors(f"{name[:200]!r} is surplus: {_ADAPTER_ALONE}")
        if path not in sites or sites[path].kind == "block":
            raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")
        return path, PREFIX + stem, key
    raise InvalidTensors(f"{name[:200]!r} is surplus: {_ADAPTER_ALONE}")


def _num_experts(found: Mapping[str, SiteTensors]) -> dict[str, int]:
    """Of each block that has a router or experts: one more than the highest number of an expert."""
    counts = {path: 0 for path, each in found.items() if each.site.kind == "block"}
    for path, each in found.items():
        numbers = [int(key.split(".")[0]) for key in each.tensors if _NUMBERED.match(key)]
        if numbers:
            block = path.rpartition(".")[0]
            counts[block] = max(counts.get(block, 0), *(number + 1 for number in numbers))
    return counts


def _router(
    config: LlavaMoleConfig, block: str, num_experts: int, found: Mapping[str, SiteTensors]
) -> Router:
    if block not in found:
        raise InvalidTensors(f"{PREFIX}{block}.router.weight is missing, while the file holds its experts")
    own = found[block]
    if num_experts == 0:
        raise InvalidTensors(f"{own.name_of('router.weight')} is surplus: no projection below it has experts")
    if num_experts > MAX_EXPERTS:
        raise InvalidTensors(
            f"{PREFIX}{block}.moe_*: found {num_experts} experts, expected at most {MAX_EXPERTS}"
        )
    weight_EI = own.need("router.weight", (num_experts, own.site.in_features))
    bias_E = own.need("router.bias", (num_experts,))
    return Router(weight_EI.to(torch.float32, copy=True), config.rule, bias_E.to(torch.float32, copy=True))


def _mixture(config: LlavaMoleConfig, found: SiteTensors, router: Router) -> Routed:
    keys = [key for e in range(router.num_experts) for key in _expert_keys(e)]
    found.refuse_others(keys, "below a router a layer has experts and no LoRA of its own")
    experts = experts_of_one_size(found, router.num_experts, config.lora, _expert_keys)
    return Routed(experts, router, from_block=True)


def _expert_keys(number: int) -> Keys:
    return f"{number}.lora_A", f"{number}.lora_B"


def _lora_keys(keys: Collection[str]) -> Keys:
    """Those of the way of writing that a layer's tensors begin with."""
    return next(pair for pair in LORAS if any(key in keys for key in pair))


def _reference_gates(config: LlavaMoleConfig, own: Mapping[str, Tensor], x_TI: Tensor) -> Tensor:
    if "router.weight" not in own:
        return torch.zeros(len(x_TI), 1, dtype=x_TI.dtype)
    logits_TE = torch.einsum("ei,ti->te", own["router.weight"], x_TI) + own["router.bias"]
    if config.mode == "dense":
        return torch.softmax(logits_TE, dim=1)
    return torch.nn.functional.one_hot(logits_TE.argmax(dim=1), logits_TE.shape[1]).to(x_TI.dtype)
