"""Programs in the storage that they are served from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, LowRank, Part, Rotation, Sparse, owned_tensors
from timbre_methods.registry import compile_adapter, derive, methods, sites_of
from timbre_methods.routing import Routed
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.placement import Layout, placed_program, tensors_of
from timbre_server.adapters.transfer import Transfer
from timbre_server.native import huge_pages
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.native.bound_kernels import BoundKernels
from timbre_server.operators.native.input_kernels import InputKernel
from timbre_server.operators.native.low_rank_experts import BoundExperts
from timbre_server.operators.routed import _BoundRouted
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.sliced_ellpack import sliced
from timbre_server.operators.step_routing import StepRouting

GROUP, MLP = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"), "layers.0.mlp.up_proj"


@pytest.mark.parametrize("method", ["lora", "fourierft", "shira", "mola", "oft"])
def test_factors_sparse_values_and_rotations_alone_are_rounded_where_asked_for(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sites = {path: Site(path, torch.randn(12, 12, generator=generator), None) for path in GROUP}
    program = compile_adapter(*methods()[method].example(sites, generator), sites)
    rounded = placed_program(
        program, Transfer(torch.device("cpu")), [GROUP], Layout(torch.bfloat16, in_slices=True)
    )

    both = list(zip(plain_parts(program), plain_parts(rounded), strict=True))
    are_rounded = [isinstance(part, (LowRank, Sparse, Rotation)) for part, _ in both]
    assert any(are_rounded) == (method != "fourierft")
    for plain, after in both:
        before = sliced(plain) if isinstance(plain, Sparse) else plain
        if isinstance(before, Rotation):
            before = replace(before, blocks_FSBB=before.blocks_FSBB - torch.eye(before.blocks_FSBB.shape[-1]))
        for one, other in zip(owned_tensors(before), owned_tensors(after), strict=True):
            is_rounded = isinstance(before, (LowRank, SlicedEllpack, Rotation)) and one.is_floating_point()
            dtype = torch.bfloat16 if is_rounded else one.dtype
            assert other.dtype == dtype
            assert torch.equal(one.to(dtype), other)


@pytest.mark.parametrize("method", ["lora", "lokr", "shira", "oft", "hira", "arrow", "lora_mixer", "xlora"])
def test_what_lies_in_huge_pages_is_what_lay_elsewhere(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = methods()[method]
    generator = torch.Generator().manual_seed(1)
    sites = {path: Site(path, torch.randn(96, 64, generator=generator), None) for path in (*GROUP, MLP)}
    config, tensors = known.example(sites_of(known, sites), generator)
    program = compile_adapter(config, tensors | derive(config, tensors, sites), sites)

    def placed() -> list[Tensor]:
        return list(tensors_of(placed_program(program, Transfer(torch.device("cpu")), [GROUP])))

    elsewhere = placed()
    monkeypatch.setattr(huge_pages, "_PAGE", 4096)  # So that these few numbers fill some.
    moved = placed()
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved if tensor.numel()}) == 1
    for one, other in zip(elsewhere, moved, strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


def plain_parts(program: AdapterProgram) -> Iterator[Part]:
    """Those of experts, too, and not their router's."""
    for part in (part for parts in program.sites.values() for part in parts):
        if isinstance(part, Routed):
            yield from (inner for expert in part.experts for inner in expert)
        else:
            yield part


@pytest.mark.cpp
@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("method", ["lora", "arrow", "lora_mixer", "smora", "loramoe", "mixlora"])
def test_a_bind_copies_no_placed_factor(method: str, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    sites = {path: Site(path, torch.randn(12, 12, generator=generator), None) for path in (*GROUP, MLP)}
    sites["layers.0.mlp"] = Site("layers.0.mlp", torch.empty(12, 12, device="meta"), None, "block")
    config, tensors = methods()[method].example(sites_of(methods()[method], sites), generator)
    program = compile_adapter(config, tensors | derive(config, tensors, sites), sites)
    placed = placed_program(program, Transfer(torch.device("cpu")), [GROUP])
    own = {t.untyped_storage().data_ptr() for _, part in placed.placed_parts() for t in owned_tensors(part)}
    found = [tensor for paths in (GROUP, (MLP,)) for tensor in bound_factors(placed, paths, num_rows)]
    assert found
    assert {tensor.untyped_storage().data_ptr() for tensor in found} <= own


def bound_factors(program: AdapterProgram, paths: Sequence[str], num_rows: int) -> list[Tensor]:
    """What the operators of low rank in C++ multiply by, bound for rows of this adapter alone."""
    operators = {operator.part: operator for operator in all_operators(StepRouting(), "native")}
    rows = ActiveRows()
    rows.begin(RowTable([Span(num_rows, ((0, 1.0),))]))
    found: list[Tensor] = []
    for bound in AdaptedGroup(paths, rows, {0: program}, operators).bound():
        of_all: list[Any] = [e._bound for e in bound.of_group] if isinstance(bound, _BoundRouted) else [bound]
        bounds = [each.kernels if isinstance(each, BoundExperts) else each for each in of_all]
        members: list[Any] = [m for each in bounds if isinstance(each, BoundKernels) for m in each._members]
        for own in members:
            if isinstance(own, InputKernel):
                found += factors_of(parts for held in own.uses._held.values() for parts in held.held[1])
    return found


def factors_of(held: Iterable[Any]) -> list[Tensor]:
    """Of parts of low rank as they are prepared, or of experts that are: those below."""
    found: list[Tensor] = []
    for parts in held:
        if isinstance(parts, Tensor):
            found.append(parts)
        elif isinstance(parts, tuple | list):
            found += factors_of(parts)
    return found
