"""Which methods exist: found by listing this package's own files, once.

A string from an adapter's config is looked up among the methods found and is never imported.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

import timbre_methods
from timbre_methods.config import MAX_CONFIG_KEYS, is_on, shown
from timbre_methods.contract import DERIVED, Method, Reader, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt_contract import NO_FRAME, Frame, PromptMethod
from timbre_methods.refusals import unknown_kind

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Element types by their names in safetensors headers."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What can be said of an adapter without its values. ``prepared_bytes`` is exact."""

    method: str
    sites: tuple[str, ...]
    parameters: int
    prepared_bytes: int
    derives: bool
    """Whether registration adds tensors that only the base's values give (`derive`)."""
    virtual_tokens: int
    invocation_tokens: tuple[int, ...]


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
    method = method_for(raw_config)
    tensors = {name: _meta(name, dtype, shape) for name, (dtype, shape) in header.items()}
    return _inspection(method, method.parse(raw_config), tensors, sites, frame)


def check_adapter(
    raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites, frame: Frame = NO_FRAME
) -> Inspection:
    """As `inspect_adapter`, with real tensors, whose values are checked too.

    The sites may be meta: they stand for their shapes alone. Raises what `Method.check_values` raises, too.
    """
    method = method_for(raw_config)
    config = method.parse(raw_config)
    shapes = {name: tensor.to("meta") for name, tensor in tensors.items()}
    inspection = _inspection(method, config, shapes, sites, frame)
    if isinstance(method, Method):
        method.check_values(config, tensors, sites)
    return inspection


def compiled(
    method: AnyMethod, config: Any, tensors: Tensors, sites: Sites, frame: Frame = NO_FRAME
) -> AdapterProgram:
    """The adapter as a program; ``config`` is what the method parsed, ``tensors`` the file's and the derived
    ones. Raises what `Method.compile` raises."""
    if isinstance(method, PromptMethod):
        return method.compile(config, tensors, sites, frame)
    return method.compile(config, tensors, sites)


def derive(raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites) -> dict[str, torch.Tensor]:
    """What the base's values give that the file leaves out (`Method.derive`); empty for most methods.

    Raises `InvalidTensors` for a file that brings such tensors itself.
    """
    method = method_for(raw_config)
    return _derived(method, method.parse(raw_config), tensors, sites)


def _derived(method: AnyMethod, config: Any, tensors: Tensors, sites: Sites) -> dict[str, torch.Tensor]:
    intruder = next((name for name in tensors if name.startswith(DERIVED)), None)
    if intruder is not None:
        raise InvalidTensors(
            f"{intruder[:200]!r} is surplus: names that begin with {DERIVED!r} are the server's own"
        )
    found = method.derive(config, tensors, sites) if isinstance(method, Method) else {}
    assert all(name.startswith(DERIVED) for name in found), f"{method.name} derives under other names"
    return found


def _inspection(method: AnyMethod, config: Any, tensors: Tensors, sites: Sites, frame: Frame) -> Inspection:
    shapes = {path: _meta_site(site) for path, site in sites.items()}
    derived = _derived(method, config, tensors, shapes)
    program = compiled(method, config, {**tensors, **derived}, shapes, frame)
    return Inspection(
        method=method.name,
        sites=tuple(program.sites),
        parameters=sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point()),
        prepared_bytes=program.prepared_bytes,
        derives=bool(derived),
        virtual_tokens=program.virtual_tokens,
        invocation_tokens=program.invocation_tokens,
    )


def _meta_site(site: Site) -> Site:
    bias_O = None if site.bias_O is None else site.bias_O.to("meta")
    return Site(site.path, site.weight_OI.to("meta"), bias_O, site.kind)


def _meta(name: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    if dtype not in DTYPES:
        raise InvalidTensors(f"{name[:200]}: found dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**62:
        raise InvalidTensors(f"{name[:200]}: found the shape {shown(list(shape))}, which no tensor has")
    return torch.empty(tuple(shape), dtype=DTYPES[dtype], device="meta")
