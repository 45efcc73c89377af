"""How an adapter's parts lie in memory: their numbers in one tensor of each dtype, and no object for a site.

An adapter on two hundred layers is a thousand Python objects. Ten thousand such adapters would weigh more in
objects than in numbers, and the garbage collector would walk them all. So what is where is a `Layout`, which
adapters of equal shape share, and parts, views of the numbers, are made for who asks.

Mixtures and places of an adapter's own, which operators know by identity, do not lie so; nor do factors of
low rank, which lie as they are bound.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from timbre_methods.bases import basis_on
from timbre_methods.packed_parts import PackedBasis
from timbre_methods.part_values import values_of
from timbre_methods.program import Basis, LowRank, Part, Places, Spectral
from timbre_methods.routing import Routed, RoutedBlock
from timbre_server.adapters.transfer import Transfer

Parts = tuple[Part, ...]


class _Range(NamedTuple):
    """Where one tensor's numbers are among those of its dtype."""

    dtype: torch.dtype
    start: int
    shape: tuple[int, ...]


class _Form(NamedTuple):
    """A part without its numbers: a `_Range` for each tensor of its own, all else as it is."""

    kind: type[Any]
    values: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Layout:
    """What is where. The very same object for all adapters of equal shapes and bases."""

    forms: Mapping[str, tuple[_Form, ...]]

    @cached_property
    def shared_bytes(self) -> dict[int, int]:
        """As `AdapterProgram.shared_bytes`."""
        bases = [v for forms in self.forms.values() for form in forms for v in form.values]
        found = (basis for basis in bases if isinstance(basis, Basis | PackedBasis | Places))
        values = (value for basis in found for value in values_of(basis))
        return {id(value): value.nbytes for value in values if isinstance(value, Tensor)}


_IN_USE: WeakValueDictionary[tuple[tuple[str, tuple[_Form, ...]], ...], Layout] = WeakValueDictionary()


class PackedSites(Mapping[str, Parts]):
    """The parts of each site, made anew whenever they are asked for; they keep the numbers alive."""

    def __init__(self, layout: Layout, numbers: Mapping[torch.dtype, Tensor]) -> None:
        self._layout = layout
        self._numbers = numbers

    def __getitem__(self, path: str) -> Parts:
        return tuple(
            form.kind(*(self._view(v) if isinstance(v, _Range) else v for v in form.values))
            for form in self._layout.forms[path]
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._layout.forms)

    def __len__(self) -> int:
        return len(self._layout.forms)

    @property
    def prepared_bytes(self) -> int:
        """As `AdapterProgram.prepared_bytes`: nothing lies between the numbers."""
        return sum(flat_N.nbytes for flat_N in self.numbers)

    @property
    def numbers(self) -> Collection[Tensor]:
        """Those of all sites, flat."""
        return self._numbers.values()

    @property
    def shared_bytes(self) -> dict[int, int]:
        """As `AdapterProgram.shared_bytes`; the very same object for all adapters of one layout."""
        return self._layout.shared_bytes

    def _view(self, place: _Range) -> Tensor:
        flat_N = self._numbers[place.dtype].narrow(0, place.start, prod(place.shape))
        return flat_N if len(place.shape) == 1 else flat_N.view(place.shape)


def may_be_packed(sites: Mapping[str, Parts]) -> bool:
    return all(_may_be_packed(part) for parts in sites.values() for part in parts)


def packed(sites: Mapping[str, Parts], transfer: Transfer) -> PackedSites:
    """A copy of parts that `may_be_packed`, on a device; a shared basis is moved there once for all."""
    found: dict[torch.dtype, list[Tensor]] = {}
    used: dict[torch.dtype, int] = {}

    def taken(tensor: Tensor) -> _Range:
        dtype = tensor.dtype
        start = used.get(dtype, 0)
        found.setdefault(dtype, []).append(tensor.flatten())
        used[dtype] = start + tensor.numel()
        return _Range(dtype, start, tuple(tensor.shape))

    def form(part: Part) -> _Form:
        values = values_of(part)
        for number, value in enumerate(values):
            if isinstance(value, Tensor):
                values[number] = taken(value)
            elif isinstance(value, Basis):
                values[number] = basis_on(value, transfer.device, transfer.moved)
        return _Form(type(part), tuple(values))

    forms = {path: tuple(map(form, parts)) for path, parts in sites.items()}
    numbers = {dtype: transfer.moved(torch.cat(pieces)) for dtype, pieces in found.items()}
    return PackedSites(_IN_USE.setdefault(tuple(forms.items()), Layout(forms)), numbers)


def _may_be_packed(part: Part) -> bool:
    has_own_places = isinstance(part, Spectral) and part.places.is_own
    return not has_own_places and not isinstance(part, (LowRank, Routed, RoutedBlock))
