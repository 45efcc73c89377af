"""Which methods exist: found by listing this package's own files, once.

A string from an adapter's config is looked up among the methods found and is never imported.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

import timbre_methods
from timbre_methods.beside import BIAS, Beside, check_copies, read_beside, refuse_strays
from timbre_methods.config import MAX_CONFIG_KEYS, is_on, shown
from timbre_methods.contract import DERIVED, Method, Reader, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.layer_stack import check_stack, without_stack
from timbre_methods.least_bytes import least_bytes, least_shared_bytes
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt_contract import NO_FRAME, Frame, PromptMethod
from timbre_methods.refusals import unknown_kind
from timbre_methods.replaced import replacement
from timbre_methods.routing import MAX_ROW_COPIES
from timbre_methods.site_tensors import NOUNS, PREFIX, article
from timbre_methods.stand_ins import meta_site, meta_tensor


@dataclass(frozen=True, slots=True)
class Inspection:
    """What can be said of an adapter without its values. ``prepared_bytes`` is of float32."""

    method: str
    sites: tuple[str, ...]
    parameters: int
    prepared_bytes: int
    least_bytes: int
    shared_bytes: int
    """Of the bases that it uses beside its own tensors, at least: others may use them, too."""
    derived_bytes: int
    """Of the tensors that registration adds (`derive`)."""
    derives: bool
    """Whether registration needs the base's values (`derive`): for tensors that only they give, or to compare
    a copy of theirs in the file."""
    virtual_tokens: int
    invocation_tokens: tuple[int, ...]
    row_copies: int
    scouts: bool


AnyMethod = Method[Any] | PromptMethod[Any]


@cache
def methods() -> Mapping[str, Method[Any]]:
    """All methods that change linear layers, by name, in alphabetical order."""
    return MappingProxyType({name: each for name, each in _readers().items() if isinstance(each, Method)})


@cache
def prompt_methods() -> Mapping[str, PromptMethod[Any]]:
    """All methods of prompts and attention, by name, in alphabetical order."""
    readers = _readers().items()
    return MappingProxyType({name: each for name, each in readers if isinstance(each, PromptMethod)})


@cache
def derivations() -> Mapping[str, int]:
    """`Reader.derivation` of the methods that have changed what they derive, by name."""
    counts = {name: each.derivation for name, each in methods().items()}
    return MappingProxyType({name: count for name, count in counts.items() if count > 1})


@cache
def _readers() -> Mapping[str, AnyMethod]:
    found: dict[str, AnyMethod] = {}
    for module_info in pkgutil.walk_packages(timbre_methods.__path__, timbre_methods.__name__ + "."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if _is_method(member) and member.__module__ == module.__name__:
                if member.name in found:
                    raise RuntimeError(f"two methods are called {member.name!r}")
                found[member.name] = member()
    return MappingProxyType(dict(sorted(found.items())))


def _is_method(member: object) -> bool:
    return inspect.isclass(member) and issubclass(member, Reader) and not inspect.isabstract(member)


def method_for(raw_config: Mapping[str, Any]) -> AnyMethod:
    """The one method that reads adapters with this config.

    Raises `UnsupportedMethod` where there is none, with what exists, and `InvalidConfig` without a peft_type.
    """
    if len(raw_config) > MAX_CONFIG_KEYS:
        raise InvalidConfig(f"the config has {len(raw_config)} keys, expected at most {MAX_CONFIG_KEYS}")
    if not isinstance(raw_config.get("peft_type"), str):
        raise InvalidConfig(
            f"adapter_config.json: peft_type: expected a string, found {shown(raw_config.get('peft_type'))}"
        )
    claimants = [method for method in _readers().values() if method.claims(raw_config)]
    if len(claimants) > 1:
        names = ", ".join(method.name for method in claimants)
        raise RuntimeError(f"the methods {names} claim the same adapter")
    if not claimants:
        raise UnsupportedMethod(_nobody_claims(raw_config))
    return claimants[0]


def _nobody_claims(raw_config: Mapping[str, Any]) -> str:
    peft_type = raw_config["peft_type"]
    for key, value in raw_config.items():
        rest = {name: other for name, other in raw_config.items() if name != key}
        nearest = next((method.name for method in _readers().values() if method.claims(rest)), None)
        if nearest is not None and is_on(value):
            return (
                f"no method here reads peft_type {shown(peft_type)} with {shown(key)} on ({shown(value)}); "
                f"without it {nearest} would"
            )
    return unknown_kind(peft_type, _readers())


def sites_of(method: Method[Any], sites: Sites) -> Sites:
    """Those of the kinds that a method adapts: what it is given."""
    return {path: site for path, site in sites.items() if site.kind in method.kinds}


def inspect_adapter(
    raw_config: Mapping[str, Any],
    header: Mapping[str, tuple[str, Sequence[int]]],
    sites: Sites,
    frame: Frame = NO_FRAME,
) -> Inspection:
    """What an adapter is, from its config and its file's header: dtype name and shape by tensor name.

    Compiles on the meta device: nothing is read and nothing allocated. Raises what `Method.parse` and
    `Method.compile` raise.
    """
    shapes = {name: meta_tensor(name, *entry) for name, entry in header.items()}
    return _inspection(raw_config, shapes, sites, frame)


def check_adapter(
    raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites, frame: Frame = NO_FRAME
) -> Inspection:
    """As `inspect_adapter`, with real tensors, whose values are checked too.

    The sites may be meta: they stand for their shapes alone. Raises what `Method.check_values` raises, too.
    """
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    inspection = _inspection(raw_config, shapes, sites, frame)
    method = method_for(raw_config)
    if isinstance(method, Method):
        own = _divided(method, raw_config, tensors, sites).own
        method.check_values(_parsed(method, raw_config), own, sites_of(method, sites))
    return inspection


def derive(raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites) -> dict[str, torch.Tensor]:
    """What the base's values give that the file leaves out (`Method.derive`); empty for most methods.

    Raises `InvalidTensors` for a file that brings such tensors itself, and `AdapterMismatch` for one that
    brings a weight of another base.
    """
    method = method_for(raw_config)
    beside = _divided(method, raw_config, tensors, sites)
    derived = _derived(method, _parsed(method, raw_config), beside.own, sites)
    if isinstance(method, Method):
        check_copies(beside, sites, lambda site: method.weight_in_training(site, derived))
    return derived


def compile_adapter(
    raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites, frame: Frame = NO_FRAME
) -> AdapterProgram:
    """A whole adapter as operators: what its method compiles, and what stands beside that in the file.

    ``tensors`` are the file's and what `derive` gave. Raises what `Method.parse` and `Method.compile` raise.
    """
    method = method_for(raw_config)
    config = _parsed(method, raw_config)
    check_stack(raw_config, frame)
    return _compiled(method, config, _divided(method, raw_config, tensors, sites), sites, frame)


def _parsed(method: AnyMethod, raw_config: Mapping[str, Any]) -> Any:
    return method.parse(without_stack(method, raw_config))


def _divided(method: AnyMethod, raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites) -> Beside:
    """The file divided, its method's own tensors at layers of the method's own kinds."""
    if isinstance(method, PromptMethod):
        return Beside(own=dict(tensors))
    layers = {path: site for path, site in sites.items() if site.kind != "block"}
    replaceable = {path: site for path, site in layers.items() if site.kind != "parameter"}
    beside = read_beside(raw_config, tensors, replaceable)
    for name in beside.own:
        path = name.removeprefix(PREFIX)
        while path and path not in layers:
            path = path.rpartition(".")[0]
        if path and layers[path].kind not in method.kinds:
            raise AdapterMismatch(_why_not_there(method, name, layers[path]))
    refuse_strays(beside, raw_config, replaceable)
    return beside


def _compiled(method: AnyMethod, config: Any, beside: Beside, sites: Sites, frame: Frame) -> AdapterProgram:
    if isinstance(method, PromptMethod):
        return method.compile(config, beside.own, sites, frame)
    program = method.compile(config, beside.own, sites_of(method, sites))
    if program.scout is not None and frame.hidden_size not in (0, program.scout.width):
        raise AdapterMismatch(
            f"the classifier reads hidden states of {program.scout.width} features, this base's have "
            f"{frame.hidden_size}"
        )
    parts = beside.parts(sites)
    both = next((path for path in parts if path in program.sites), None)
    if both is not None:
        raise InvalidTensors(beside.why_not_both(sites[both]))
    parts |= program.sites
    for path, found in beside.biases.items():
        if method.scales_bias:
            raise InvalidTensors(
                f"{found.name_of(BIAS)} is not served: {method.name} changes what the base's own bias adds; "
                'train with bias="none"'
            )
        parts[path] = (*parts.get(path, ()), *replacement(found, "base_layer."))
    return replace(program, sites={path: parts[path] for path in sites if path in parts})


def _why_not_there(method: Method[Any], name: str, site: Site) -> str:
    if name == PREFIX + site.path:
        return (
            f"{name[:200]}: {site.path!r} is {article(site)}, and none is replaced here; leave its module "
            "out of modules_to_save"
        )
    kinds = " and ".join(f"{noun}s" for kind, noun in NOUNS.items() if kind in method.kinds)
    option = "target_parameters" if site.kind == "parameter" else "target_modules"
    return (
        f"{name[:200]}: {site.path!r} is {article(site)}, and {method.name} adapts {kinds} alone; "
        f"leave it out of {option}"
    )


def _derived(method: AnyMethod, config: Any, own: Tensors, sites: Sites) -> dict[str, torch.Tensor]:
    intruder = next((name for name in own if name.startswith(DERIVED)), None)
    if intruder is not None:
        raise InvalidTensors(
            f"{intruder[:200]!r} is surplus: names that begin with {DERIVED!r} are the server's own"
        )
    found = method.derive(config, own, sites_of(method, sites)) if isinstance(method, Method) else {}
    assert all(name.startswith(DERIVED) for name in found), f"{method.name} derives under other names"
    return found


def _inspection(raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites, frame: Frame) -> Inspection:
    shapes = {path: meta_site(site) for path, site in sites.items()}
    method = method_for(raw_config)
    config = _parsed(method, raw_config)
    check_stack(raw_config, frame)
    beside = _divided(method, raw_config, tensors, shapes)
    derived = _derived(method, config, beside.own, shapes)
    beside.own |= derived
    program = _compiled(method, config, beside, shapes, frame)
    if program.row_copies > MAX_ROW_COPIES:
        raise InvalidConfig(
            f"each token would run through a block of the base {program.row_copies} times, once for each "
            f"expert that its router may keep; expected at most {MAX_ROW_COPIES}"
        )
    learned = [tensor for name, tensor in tensors.items() if name not in beside.copies]
    return Inspection(
        method=method.name,
        sites=tuple(program.sites),
        parameters=sum(tensor.numel() for tensor in learned if tensor.is_floating_point()),
        prepared_bytes=program.prepared_bytes,
        least_bytes=least_bytes(program),
        shared_bytes=least_shared_bytes(program),
        derived_bytes=sum(tensor.nbytes for tensor in derived.values()),
        derives=bool(derived or beside.copies),
        virtual_tokens=program.virtual_tokens,
        invocation_tokens=program.invocation_tokens,
        row_copies=program.row_copies,
        scouts=program.scout is not None,
    )
