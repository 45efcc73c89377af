"""Puts a compiled program where it is served from: on the device, in storage of exactly its own size.

Nothing keeps the file's memory alive, and the prepared bytes are the real ones. Factors of low rank, and
sparse values in slices, lie in 16 bits where these hold what they are, as with most that were uploaded so;
all others do too, and rotations in C++, if they are to be rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from timbre_methods.bases import basis_on
from timbre_methods.part_values import values_of
from timbre_methods.program import (
    AdapterProgram,
    AnyPart,
    Dense,
    LowRank,
    Part,
    Projected,
    Rotation,
    Sparse,
    owned_tensors,
)
from timbre_methods.routing import Routed, RoutedBlock, Router, Scout, Scouted
from timbre_server.adapters.packed_parts import packed_dense, with_packed_basis
from timbre_server.adapters.packed_sites import PackedSites, may_be_packed, packed
from timbre_server.adapters.transfer import Transfer
from timbre_server.native.huge_pages import move_together
from timbre_server.operators.low_rank import side_by_side
from timbre_server.operators.rotation import narrowed as narrowed_rotation
from timbre_server.operators.sliced_ellpack import sliced

PartT = TypeVar("PartT", bound=AnyPart | Router)


@dataclass(frozen=True, slots=True)
class Layout:
    """How parts lie in memory, as suits what runs them."""

    rounded_to: torch.dtype | None = None
    """What factors of low rank are rounded to, and values in slices; None: they keep their values."""
    in_slices: bool = False
    """Sparse matrices, as C++ reads them; if others are rounded, rotations to bfloat16."""
    in_panels: bool = False
    """Bases that adapters share, and dense changes of linear layers, as C++ multiplies by them in bfloat16;
    they are rounded to it."""


AS_GIVEN = Layout()


def placed_program(
    program: AdapterProgram,
    transfer: Transfer,
    groups: Sequence[Sequence[str]],
    layout: Layout = AS_GIVEN,
) -> AdapterProgram:
    """The program on its device. What `may_be_packed` is; of all else each tensor is contiguous in storage of
    its own, but for factors that are bound together at ``groups``: they lie side by side in one, and no bind
    copies them. A shared basis is moved once, for all adapters that use it. On a CPU all but bases then lies
    together, in huge pages."""
    placement = _Placement(program, transfer, groups, layout)
    placed = replace(
        program,
        sites=placement.sites(program.sites),
        prompt=None if program.prompt is None else placement.part(program.prompt),
        scout=None if program.scout is None else placement.part(program.scout),
        attention={layer: placement.part(part) for layer, part in program.attention.items()},
    )
    if transfer.device.type == "cpu":
        move_together(tensors_of(placed))
    return placed


def tensors_of(program: AdapterProgram) -> Iterator[Tensor]:
    """Those that belong to the adapter, for changing them in place."""
    if isinstance(program.sites, PackedSites):
        yield from program.sites.numbers
        program = replace(program, sites={})
    yield from (tensor for _, part in program.placed_parts() for tensor in owned_tensors(part))


class _Placement:
    """Of one program's parts."""

    def __init__(
        self,
        program: AdapterProgram,
        transfer: Transfer,
        groups: Sequence[Sequence[str]],
        layout: Layout,
    ) -> None:
        self._transfer, self._layout = transfer, layout
        self._linear = {path for group in groups for path in group}
        laid_out = partial(
            side_by_side, device=transfer.device, move=transfer.moved, rounded_to=layout.rounded_to
        )
        self._joined: dict[int, Any] = {
            id(part): there
            for members in _factors_bound_together(program, groups)
            for before, after in zip(members, laid_out(members), strict=True)
            for part, there in zip(before, after, strict=True)
        }
        self._routers: dict[int, Router | Scouted] = {}

    def sites(self, sites: Mapping[str, tuple[Part, ...]]) -> Mapping[str, tuple[Part, ...]]:
        if self._layout.in_slices or self._layout.in_panels:
            sites = {
                path: tuple(self._laid_out(part, path) for part in parts) for path, parts in sites.items()
            }
        if may_be_packed(sites):
            return packed(sites, self._transfer)
        return {path: tuple(map(self.part, parts)) for path, parts in sites.items()}

    def part(self, part: PartT) -> PartT:
        if id(part) in self._joined:
            there: PartT = self._joined[id(part)]
            return there
        owned = {id(tensor) for tensor in owned_tensors(part)}
        changes: dict[str, Any] = {
            name: self._own(value)
            for name, value in zip(part.__match_args__, values_of(part), strict=True)
            if id(value) in owned
        }
        if isinstance(part, Scout):
            changes = {name: tuple(map(self._own, getattr(part, name))) for name in ("weights", "biases")}
        if isinstance(part, Projected):
            changes["basis"] = basis_on(part.basis, self._transfer.device, self._transfer.moved)
        if isinstance(part, (Routed, RoutedBlock)):
            changes["router"] = self._router(part.router)
        if isinstance(part, Routed):
            changes["experts"] = tuple(
                tuple(self.part(self._laid_out(inner)) for inner in expert) for expert in part.experts
            )
        return replace(part, **changes)

    def _laid_out(self, part: Part, path: str = "") -> Part:
        """``path``: of a site, of which an expert says nothing."""
        if isinstance(part, Sparse) and self._layout.in_slices:
            return sliced(part, self._layout.rounded_to)
        if isinstance(part, Rotation) and self._layout.in_slices and self._layout.rounded_to is not None:
            return narrowed_rotation(part)
        if isinstance(part, Projected) and self._layout.in_panels:
            return with_packed_basis(part)
        if isinstance(part, Dense) and self._layout.in_panels and path in self._linear:
            return packed_dense(part)
        return part

    def _router(self, router: Router | Scouted) -> Router | Scouted:
        """A block and the sites below it, and sites with a scout's gates in common, go on sharing theirs."""
        if id(router) not in self._routers:
            self._routers[id(router)] = self.part(router) if isinstance(router, Router) else replace(router)
        return self._routers[id(router)]

    def _own(self, tensor: Tensor) -> Tensor:
        return self._transfer.moved(tensor.clone(memory_format=torch.contiguous_format))


def _factors_bound_together(
    program: AdapterProgram, groups: Sequence[Sequence[str]]
) -> Iterator[Sequence[Sequence[LowRank]]]:
    """Of each member of a group its parts of low rank, as operators bind them: an adapter's own apart from
    its experts'."""
    own: dict[str, list[LowRank]] = {}
    of_experts: dict[str, list[LowRank]] = {}
    for path, parts in program.sites.items():
        for part in parts:
            if isinstance(part, LowRank):
                own.setdefault(path, []).append(part)
            elif isinstance(part, Routed):
                inner = (each for expert in part.experts for each in expert)
                of_experts.setdefault(path, []).extend(each for each in inner if isinstance(each, LowRank))
    for factors in (own, of_experts):
        for group in groups if factors else ():
            members = [factors.pop(path, []) for path in group]
            if any(members):
                yield members
        yield from ([alone] for alone in factors.values() if alone)
