"""Dense changes, and bases that adapters share, once for all: rounded, and what they were made of goes."""

from __future__ import annotations

import gc
from dataclasses import replace
from weakref import ref

import pytest
import torch

from timbre_methods.bases import shared_basis
from timbre_methods.least_bytes import least_bytes, least_shared_bytes
from timbre_methods.packed_parts import PackedDense, PackedProjected
from timbre_methods.program import AdapterProgram, Basis, Dense, Projected
from timbre_server.adapters.packed_parts import with_packed_basis
from timbre_server.adapters.placement import Layout, placed_program
from timbre_server.adapters.transfer import Transfer
from timbre_server.operators import packed_dense
from timbre_server.operators.packed_projected import unpacked

pytestmark = pytest.mark.cpp

IN, OUT = 45, 67
LAYOUT = Layout(in_panels=True)


def diagonal(rank: int) -> Projected:
    """Of three blocks."""
    generator = torch.Generator().manual_seed(rank)
    sides = (torch.randn(3, *shape, generator=generator) for shape in ((rank, IN), (OUT, rank)))
    return Projected("diagonal", torch.ones(3, rank), Basis(*sides))


def test_a_packed_basis_is_the_rounded_one() -> None:
    part = diagonal(16)
    found = with_packed_basis(part)
    assert isinstance(found, PackedProjected)
    for side in ("p_NPI", "q_NOQ"):
        rounded = getattr(part.basis, side).bfloat16().float()
        assert torch.equal(getattr(unpacked(found).basis, side), rounded)


def test_what_would_take_more_or_runs_otherwise_is_left() -> None:
    narrow = diagonal(1)
    assert with_packed_basis(narrow) is narrow, "panels of mostly zeros"
    with_vectors = replace(diagonal(16), outer_NO=torch.ones(3, OUT))
    assert with_packed_basis(with_vectors) is with_vectors, "each block's outputs are multiplied apart"


def test_dense_changes_of_linear_layers_take_half() -> None:
    delta_OI = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    program = AdapterProgram({path: (Dense(delta_OI),) for path in ("linear", "embedding")})
    placed = placed_program(program, Transfer(torch.device("cpu")), [("linear",)], LAYOUT)
    (packed,), (left,) = placed.sites["linear"], placed.sites["embedding"]
    assert isinstance(packed, PackedDense)
    assert torch.equal(packed_dense.unpacked(packed).delta_OI, delta_OI.bfloat16().float())
    assert isinstance(left, Dense), "its rows are looked up"
    assert placed.prepared_bytes == 6 * delta_OI.numel()
    assert least_bytes(program) == 4 * delta_OI.numel()


def test_adapters_share_one_packed_basis_and_nothing_keeps_the_other() -> None:
    torch.manual_seed(1)
    p_NPI, q_NOQ = torch.randn(1, 32, IN), torch.randn(1, OUT, 32)
    held = []

    def program() -> AdapterProgram:
        basis = shared_basis(p_NPI, q_NOQ)
        held.append(ref(basis))
        return AdapterProgram({"a": (Projected("diagonal", torch.randn(1, 32), basis),)})

    least = least_shared_bytes(program())
    first, second = (
        placed_program(program(), Transfer(torch.device("cpu")), [("a",)], LAYOUT) for _ in range(2)
    )
    gc.collect()
    assert [basis() for basis in held] == [None] * 3
    assert first.shared_bytes.keys() == second.shared_bytes.keys()
    taken = sum(first.shared_bytes.values())
    assert least == 2 * (p_NPI.numel() + q_NOQ.numel()) <= taken
    assert taken <= 2 * 32 * (IN + 31 + OUT + 31)
    assert first.prepared_bytes == 4 * 32
