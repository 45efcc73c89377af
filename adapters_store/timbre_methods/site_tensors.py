"""From the names in an adapter's file to the tensors of each site.

PEFT names a layer's tensor ``base_model.model.<module path>.<key>``. The names alone say which layers
are adapted. Every tensor is taken by a site or refused by name. This module knows no method.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from timbre_methods.contract import DERIVED, Site, SiteKind, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidTensors

PREFIX = "base_model.model."
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NOUNS: Mapping[SiteKind, str] = {
    "linear": "linear layer",
    "embedding": "embedding",
    "norm": "norm",
    "block": "block",
    "parameter": "parameter",
}
"""What a site of each kind is called."""

_ON_EMBEDDINGS = "this method has no adapters on embeddings; target linear layers only"
_REFUSED_ENDINGS: Mapping[str, str] = {
    "base_layer.weight": "it would replace a weight of the base; list the layer in modules_to_save instead",
    "base_layer.bias": 'it would replace a bias of the base; train with bias="none"',
    "lora_embedding_A": _ON_EMBEDDINGS,
    "lora_embedding_B": _ON_EMBEDDINGS,
}


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """Raises `InvalidTensors`, with found and expected, for another shape or dtype; a letter in ``shape`` is
    a size that may be anything from 1."""
    if not _fits(tensor.shape, shape):
        expected = ", ".join(map(str, shape))
        raise InvalidTensors(f"{name}: found shape {list(tensor.shape)}, expected [{expected}]")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise InvalidTensors(f"{name}: found dtype {found}, expected one of {wanted}")


def _fits(found: Sequence[int], shape: tuple[int | str, ...]) -> bool:
    if len(found) != len(shape):
        return False
    for size, wanted in zip(found, shape, strict=True):
        if size != wanted and not (isinstance(wanted, str) and size >= 1):
            return False
    return True


@dataclass(frozen=True, slots=True, eq=False)
class SiteTensors:
    """The tensors that a file holds for one site, by the method's own keys."""

    site: Site
    tensors: Mapping[str, Tensor]
    derived: Mapping[str, Tensor] = field(default_factory=dict)
    """What `Method.derive` added for this site, by key."""
    stem: str | None = None
    """What the tensors' names begin with, where that is not `PREFIX` and the site's path."""

    def get(
        self, key: str, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> Tensor | None:
        """The tensor under a key, or None where the file has none.

        ``shape`` holds sizes, or a letter for a size that may be anything from 1. Raises `InvalidTensors`
        with found and expected for another shape or dtype.
        """
        tensor = self.tensors.get(key)
        if tensor is None:
            return None
        check_tensor(self.name_of(key), tensor, shape, dtypes)
        return tensor

    def need(
        self, key: str, shape: tuple[int | str, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
    ) -> Tensor:
        """As `get`, and a missing tensor is refused too."""
        tensor = self.get(key, shape, dtypes)
        if tensor is None:
            found = _first_of([self.name_of(other) for other in self.tensors]) or "nothing else of it"
            raise InvalidTensors(f"{self.name_of(key)} is missing, while the file holds {found}")
        return tensor

    def refuse_others(self, keys: Collection[str], reason: str) -> None:
        """Raise `InvalidTensors` for a tensor of the site under any further key."""
        other = next((key for key in self.tensors if key not in keys), None)
        if other is not None:
            raise InvalidTensors(f"{self.name_of(other)} is surplus: {reason}")

    def name_of(self, key: str) -> str:
        """The tensor's name in the file."""
        return f"{PREFIX + self.site.path if self.stem is None else self.stem}.{key}"


def tensors_by_site(
    tensors: Tensors,
    sites: Sites,
    keys: frozenset[str],
    *,
    beside: Collection[str] = (),
) -> Iterator[SiteTensors]:
    """The file's tensors, site by site in the base's order. ``keys`` are all keys that the method reads.

    ``beside`` are full names of tensors that no site owns and that the method reads itself.

    Raises `InvalidTensors` for a tensor that no site takes and for an empty file, `AdapterMismatch` for a
    site that the base lacks.
    """
    found: dict[str, dict[str, Tensor]] = {}
    derived: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name in beside:
            continue
        if name.startswith(DERIVED):
            path, _, key = name.removeprefix(DERIVED).rpartition(".")
            derived.setdefault(path, {})[key] = tensor
            continue
        path, key = _split(name, keys)
        if path not in sites:
            raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")
        found.setdefault(path, {})[key] = tensor
    if not found:
        raise InvalidTensors("the file holds no tensor, expected at least one adapted layer")
    for path, site in sites.items():
        if path in found:
            yield SiteTensors(site, found[path], derived.get(path, {}))


def derived_name(path: str, key: str) -> str:
    """The full name of a site's derived tensor."""
    return f"{DERIVED}{path}.{key}"


def derived_of_site(tensors: Tensors, path: str) -> dict[str, Tensor]:
    """The derived tensors of one site by key; a key has no dot."""
    stem = f"{DERIVED}{path}."
    return {
        name.removeprefix(stem): tensor
        for name, tensor in tensors.items()
        if name.startswith(stem) and "." not in name.removeprefix(stem)
    }


def tensors_of_site(tensors: Tensors, site: Site, keys: frozenset[str]) -> dict[str, Tensor]:
    """The tensors that the file holds for this one site, by key, unchecked; empty where it is not adapted."""
    names = {key: f"{PREFIX}{site.path}.{key}" for key in keys}
    return {key: tensors[name] for key, name in names.items() if name in tensors}


def nearest_fact(path: str, sites: Sites) -> str:
    """What the base has where an adapter names a module that is none of these sites."""
    steps = path.split(".")
    for length in range(len(steps), -1, -1):
        parent = ".".join(steps[:length])
        below = [site for site in sites if not parent or site == parent or site.startswith(parent + ".")]
        if below:
            break
    children = list(dict.fromkeys(site.removeprefix(parent).lstrip(".").split(".")[0] for site in below))
    shown = _first_of(children)
    nouns = " or ".join(dict.fromkeys(NOUNS[site.kind] for site in sites.values()))
    is_site = f"{parent!r} is {article(sites[parent])} itself" if parent in sites else ""
    around = is_site or f"below {parent!r} it has {shown}"
    return f"this base has no {nouns} {path[:120]!r} that can be adapted here; {around}"


def article(site: Site) -> str:
    """``a linear layer``, ``an embedding``."""
    noun = NOUNS[site.kind]
    return f"an {noun}" if noun.startswith("e") else f"a {noun}"


def _split(name: str, keys: frozenset[str]) -> tuple[str, str]:
    if name.startswith(PREFIX):
        path, *steps = name[len(PREFIX) :].rsplit(".", _most_steps(keys))
        while steps:
            if (key := ".".join(steps)) in keys:
                return path, key
            path = f"{path}.{steps.pop(0)}"
    for ending, reason in _REFUSED_ENDINGS.items():
        if name.endswith(ending):
            raise InvalidTensors(f"{name[:200]} is not served: {reason}")
    endings = _first_of(sorted(keys))
    raise InvalidTensors(
        f"{name[:200]!r} is surplus: no layer takes it; "
        f"expected names like '{PREFIX}<module path>.<key>' with one of the keys {endings}"
    )


@cache
def _most_steps(keys: frozenset[str]) -> int:
    """Names between the dots of a key, at most."""
    return max((key.count(".") + 1 for key in keys), default=0)


def _first_of(names: Sequence[str]) -> str:
    """Names as a message may list them."""
    return ", ".join(names[:8]) + (f", ... {names[-1]}" if len(names) > 8 else "")
