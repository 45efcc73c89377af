"""LoRA on bare parameters, as PEFT saves it with ``target_parameters``, beside plain LoRA on layers.

A parameter [E, O, I] (of experts, say) is E matrices: ``W[e] += s B[e] A[e]``. One with two dimensions is one
matrix. The file stacks the factors of a slice: A [r E, in] expert after expert, B [out, r E] rank after rank
with the expert running fastest. Where the module reads its slices as [in, out] (`Site.is_transposed`), the
change is the transpose.

The parameter's own name is not in the file. PEFT wraps a module once for each of its parameters that
``target_parameters`` names, in the order of definition, so the key says how many wrappers are further out:
``experts.base_layer.lora_A.weight`` is the first of two, ``experts.lora_A.weight`` the second. A name means
every parameter whose path ends with it; the patterns of ranks and alphas see that path.

Legend: T tokens, E slices, I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import is_on
from timbre_methods.contract import DERIVED, Method, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, random_tensor
from timbre_methods.low_rank.lora import (
    FACTORS,
    MOVING_INITIALISERS,
    VARIANTS,
    Lora,
    LoraConfig,
    initialiser,
    lora_example,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, LowRank, Part, SlicedLowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, derived_of_site

SWITCH = "target_parameters"
_OF_LAYERS_ALONE = ("lora_bias", "monteclora_config", "velora_config")
"""Options of LoRA that PEFT has for layers and not for parameters."""

Ending = Annotated[str, Field(min_length=1, max_length=256)]


class ParameterLoraConfig(LoraConfig):
    """LoRA's fields, and the endings of the parameters' paths."""

    target_parameters: list[Ending] = Field(min_length=1, max_length=1024)


@dataclass(frozen=True, slots=True, eq=False)
class _Target:
    """One targeted parameter: its site, its path in the base, and what stands for that in the file."""

    site: Site
    parameter: str
    stem: str

    def found_in(self, tensors: Tensors) -> SiteTensors:
        names = {key: f"{PREFIX}{self.stem}.{key}" for key in FACTORS}
        own = {key: tensors[name] for key, name in names.items() if name in tensors}
        return SiteTensors(self.site, own, stem=PREFIX + self.stem)


class ParameterLora(Method[ParameterLoraConfig]):
    name = "parameter_lora"
    paper = "arXiv 2106.09685"
    stored = "A [r E, in], B [out, r E] of a parameter of E slices; of layers as `lora`"
    checked_against = "PEFT"
    kinds = frozenset({"linear", "embedding", "parameter"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        if raw_config.get("peft_type") != "LORA" or initialiser(raw_config) in MOVING_INITIALISERS:
            return False
        return {switch for switch in VARIANTS if is_on(raw_config.get(switch))} == {SWITCH}

    def parse(self, raw_config: Mapping[str, Any]) -> ParameterLoraConfig:
        config = read_lora_config(ParameterLoraConfig, raw_config)
        option = next((option for option in _OF_LAYERS_ALONE if is_on(raw_config.get(option))), None)
        if option is not None:
            raise UnsupportedMethod(
                f"LORA with target_parameters: the option {option!r} is on and is not served: it has no "
                "meaning on a parameter; switch it off"
            )
        return config

    def compile(self, config: ParameterLoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(DERIVED)}
        parts: dict[str, tuple[Part, ...]] = {}
        for target in targets_of(config.target_parameters, sites):
            found = target.found_in(tensors)
            parts[target.site.path] = (_part(config, alphas, target.parameter, found),)
            for key in found.tensors:
                del rest[found.name_of(key)]
        if rest or not parts:
            _refuse_wrappers(rest, sites)
            layers = {path: site for path, site in sites.items() if site.kind != "parameter"}
            plain = Lora().compile(config, rest, layers).sites
            both = next((path for path in plain if path in parts), None)
            if both is not None:
                raise InvalidTensors(f"the file adapts {both!r} and its parameter, too; expected one of them")
            parts |= plain
        return AdapterProgram({path: parts[path] for path in sites if path in parts})

    def for_reference(self, config: ParameterLoraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        return {
            derived_name(target.site.path, key.partition(".")[0]): tensor
            for target in targets_of(config.target_parameters, sites)
            for key, tensor in target.found_in(tensors).tensors.items()
        }

    def reference(self, config: ParameterLoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = {key: t.to(x_TI.dtype) for key, t in derived_of_site(tensors, site.path).items()}
        if not own:
            return Lora().reference(config, tensors, site, x_TI)
        a, b = own["lora_A"], own["lora_B"]
        rank = a.shape[0] // site.slices
        s = reference_scale(config, replace(site, path=_parameter_of(site)), rank)
        deltas = [b[:, e :: site.slices] @ a[e * rank : (e + 1) * rank] for e in range(site.slices)]
        delta_OI = torch.cat([delta.T if site.is_transposed else delta for delta in deltas])
        adapted_OI = site.weight_OI.to(x_TI.dtype) + s * delta_OI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        layers = {path: site for path, site in sites.items() if site.kind != "parameter"}
        parameters = {path: site for path, site in sites.items() if site.kind == "parameter"}
        chosen = chosen_sites(parameters or layers, generator)
        if parameters and coin(generator):
            chosen.append(chosen_sites(layers, generator)[-1])
        plain = {path: site for path, site in layers.items() if site not in chosen}
        raw_config, tensors = lora_example(plain or layers, generator, with_bias=False)
        names = [_parameter_of(site) for site in chosen]
        own: dict[str, Tensor] = {}
        for target in targets_of(names, sites):
            stacked = raw_config["r"] * target.site.slices
            ins, outs = _features(target.site)
            own[f"{PREFIX}{target.stem}.{FACTORS[0]}"] = random_tensor((stacked, ins), generator)
            own[f"{PREFIX}{target.stem}.{FACTORS[1]}"] = random_tensor((outs, stacked), generator)
        raw_config |= {SWITCH: names, "alpha_pattern": {names[0]: 5, **raw_config["alpha_pattern"]}}
        return raw_config, own | tensors if plain else own


def targets_of(endings: Sequence[str], sites: Sites) -> list[_Target]:
    """The parameters that end in one of these names, in the base's order."""
    dotted = tuple(f".{ending}" for ending in endings)
    paths = {site.path: _parameter_of(site) for site in sites.values() if site.kind != "norm"}
    meant = {path: own for path, own in paths.items() if f".{own}".endswith(dotted)}
    wrapped: dict[str, int] = {}
    found = []
    for path, parameter in reversed(meant.items()):
        module = parameter.rpartition(".")[0]
        further_out = wrapped.get(module, 0)
        wrapped[module] = further_out + 1
        found.append(_Target(sites[path], parameter, module + ".base_layer" * further_out))
    return found[::-1]


def _refuse_wrappers(rest: Tensors, sites: Sites) -> None:
    """Raises `AdapterMismatch` for factors at a module with parameters, none of which was meant."""
    modules: dict[str, list[str]] = {}
    for path in (path for path, site in sites.items() if site.kind == "parameter"):
        modules.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    for name in rest:
        module = name.removeprefix(PREFIX)
        for key in FACTORS:
            module = module.removesuffix(f".{key}")
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        if module in modules:
            raise AdapterMismatch(
                f"{name[:200]}: target_parameters names no parameter of {module[:120]!r} for it; "
                f"this base has {', '.join(modules[module][:8])} there"
            )


def _parameter_of(site: Site) -> str:
    return site.path if site.kind == "parameter" else f"{site.path}.weight"


def _features(site: Site) -> tuple[int, int]:
    """What the factors of a targeted parameter read and give: PEFT goes by how its slices lie in the base."""
    rows = site.out_features // site.slices
    return (rows, site.in_features) if site.is_transposed else (site.in_features, rows)


def _part(config: LoraConfig, alphas: PathPatterns, parameter: str, found: SiteTensors) -> Part:
    site = found.site
    ins, outs = _features(site)
    key_a, key_b = FACTORS
    a = found.need(key_a, ("r", ins))
    b = found.need(key_b, (outs, a.shape[0]))
    rank, left = divmod(a.shape[0], site.slices)
    if left:
        raise InvalidTensors(
            f"{found.name_of(key_a)}: found {a.shape[0]} rows, expected as many for each of "
            f"{site.slices} slices of {parameter[:120]!r}"
        )
    check_rank(found, key_a, rank, config.r, config.rank_pattern)
    a_ERI = a.to(torch.float32, copy=True).reshape(site.slices, rank, ins)
    b_EOR = b.to(torch.float32, copy=True).reshape(outs, rank, site.slices).permute(2, 0, 1)
    if site.is_transposed:
        a_ERI, b_EOR = b_EOR.mT, a_ERI.mT
    b_EOR = b_EOR * scale(config, alphas, parameter, rank)
    return SlicedLowRank(a_ERI, b_EOR) if site.kind == "parameter" else LowRank(a_ERI[0], b_EOR[0])
