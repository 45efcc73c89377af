"""Shared bases in C++ against PyTorch: how many rows and directions, who shares, who mixes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from crowds import CROWDS
from torch import Tensor

from timbre_methods.packed_parts import PackedProjected
from timbre_methods.program import Basis, Projected
from timbre_server.adapters.packed_parts import in_packed_basis, with_packed_basis
from timbre_server.operators.contract import Operator
from timbre_server.operators.native.projected import NativePackedProjected, NativeProjected, _is_served
from timbre_server.operators.packed_projected import PackedProjectedOperator
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

IN, OUTS, BLOCKS = 45, (67, 12), 3
Uses = list[dict[int, list[Projected]]]


# Of diagonal cores: blocks of P and of Q, and whether there are inner and outer vectors.
KINDS = {
    "plain": (1, 1, False, False),
    "vera": (1, 1, False, True),
    "both vectors": (1, 1, True, True),
    "blocks": (BLOCKS, BLOCKS, False, False),
    "randlora wide": (1, BLOCKS, True, False),
    "randlora tall": (BLOCKS, 1, False, True),
}


FORMS = [*KINDS, "dense", "sparse", "of all forms"]


def drawn(kind: str, rank: int, generator: torch.Generator) -> Uses:
    """Twelve adapters in one basis at two members, whose P is the same; slices of larger tensors."""
    if kind not in KINDS:
        return with_cores(kind, rank, generator)
    p_blocks, q_blocks, has_inner, has_outer = KINDS[kind]
    blocks = max(p_blocks, q_blocks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 2

    wide_PI = normal(p_blocks * rank, IN + 5)
    p_NPI = wide_PI.view(p_blocks, rank, IN + 5)[:, :, :IN]
    uses: Uses = []
    for member, out_features in enumerate(OUTS):
        wide_ONQ = normal(out_features + 3, q_blocks, rank)
        basis = Basis(p_NPI, wide_ONQ[:out_features].transpose(0, 1))
        uses.append(
            {
                slot: [
                    Projected(
                        "diagonal",
                        normal(rank, blocks).T,
                        basis,
                        inner_NI=normal(IN, blocks).T if has_inner else None,
                        outer_NO=normal(out_features, blocks).T if has_outer else None,
                    )
                ]
                for slot in (range(12) if member == 0 else (0, 2, 5))
            }
        )
    return uses


def with_cores(kind: str, rank: int, generator: torch.Generator) -> Uses:
    """Of bases with one more direction in P than in Q."""
    wide_PI = torch.randn(rank + 1, IN, generator=generator) / 2
    bases = [Basis(wide_PI[None], torch.randn(1, out, rank, generator=generator) / 2) for out in OUTS]
    square = drawn("plain", rank, generator)

    def cores(slot: int, member: int) -> list[Projected]:
        own = [dense_core(bases[member], generator), sparse_core(bases[member], generator)]
        if kind == "of all forms":
            basis = square[member][slot][0].basis
            return [*own, *square[member][slot], dense_core(basis, generator), own[0]]
        return [own[kind == "sparse"]]

    return [{slot: cores(slot, member) for slot in own} for member, own in enumerate(square)]


def dense_core(basis: Basis, generator: torch.Generator) -> Projected:
    shape = basis.p_NPI.shape[1], basis.q_NOQ.shape[2]
    return Projected("dense", torch.randn(*shape, generator=generator).T, basis)


def sparse_core(basis: Basis, generator: torch.Generator) -> Projected:
    """Of entries in any order, some of them at one place."""
    count = 3 * basis.p_NPI.shape[1]
    places = [
        torch.randint(size, (count,), generator=generator)
        for size in (basis.q_NOQ.shape[2], basis.p_NPI.shape[1])
    ]
    return Projected("sparse", torch.randn(count, generator=generator), basis, *places)


def packed(uses: Uses) -> list[dict[int, list[PackedProjected]]]:
    return [{slot: list(map(in_packed_basis, parts)) for slot, parts in own.items()} for own in uses]


def agree_packed(uses: Uses, crowd: str, generator: torch.Generator) -> None:
    """To what bfloat16 leaves of what is multiplied twice."""
    table, own = RowTable(CROWDS[crowd]), packed(uses)
    x_TI = torch.randn(table.num_rows, IN, generator=generator).bfloat16().float()
    sums: list[list[Tensor]] = []
    for operator in (NativePackedProjected(), PackedProjectedOperator()):
        found = [torch.zeros(table.num_rows, out) for out in OUTS]
        for changes, y_TO in zip(operator.bind(own, table).sums(x_TI), found, strict=True):
            for change in changes:
                change.add_to(y_TO)
        sums.append(found)
    for got, expected in zip(*sums, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=0.02, atol=0.02 * max(1.0, float(expected.abs().max()))
        )


def agree(uses: Uses, crowd: str, generator: torch.Generator) -> None:
    table = RowTable(CROWDS[crowd])
    x_TI = torch.randn(IN, table.num_rows, generator=generator).T
    before = [torch.randn(table.num_rows, out, generator=generator) for out in OUTS]
    native, plain = ([y.clone() for y in before] for _ in range(2))
    for operator, found in ((NativeProjected(), native), (ProjectedOperator(), plain)):
        for changes, y_TO in zip(operator.bind(uses, table).sums(x_TI), found, strict=True):
            for change in changes:
                change.add_to(y_TO)
    for got, expected, y_TO in zip(native, plain, before, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)
        row = 0
        for span in CROWDS[crowd]:
            assert span.pairs or torch.equal(got[row : row + span.num_rows], y_TO[row : row + span.num_rows])
            row += span.num_rows


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [1, 7, 40])
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("kind", FORMS)
def test_every_crowd_gets_what_pytorch_gives(kind: str, crowd: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    uses = drawn(kind, rank, generator)
    assert all(_is_served(part) for own in uses for parts in own.values() for part in parts)
    agree(uses, crowd, generator)
    agree_packed(uses, crowd, generator)


@pytest.mark.parametrize("num_rows", [*range(1, 35), 48, 49, 97, 150])
def test_every_number_of_rows_is_served_whole(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    monkeypatch.setitem(CROWDS, "rows", [Span(1, ((row % 12, 1.0),)) for row in range(num_rows)])
    uses = drawn("vera", 16, generator)
    agree(uses, "rows", generator)
    agree_packed(uses, "rows", generator)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_a_row_has_the_same_bits_whoever_is_beside_it(kind: str, *, is_packed: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    uses, x_I = drawn(kind, 40, generator), torch.randn(IN, generator=generator)
    others = [drawn(kind, rank, generator)[0] for rank in (40, 11)]
    uses[0].update({20 + slot: parts for own in others for slot, parts in own.items()})
    mine = Span(1, ((1, 0.5), (0, 2.0), (23, 1.0)))
    made = packed(uses) if is_packed else uses

    def changed(*beside: Span) -> Tensor:
        table = RowTable([*beside, mine])
        x_TI = torch.randn(table.num_rows, IN, generator=generator)
        x_TI[-1] = x_I
        y_TO = torch.zeros(table.num_rows, OUTS[0])
        operator: Operator[Any] = NativePackedProjected() if is_packed else NativeProjected()
        for change in operator.bind(made, table).sums(x_TI)[0]:
            change.add_to(y_TO)
        return y_TO[-1]

    alone = changed()
    for num_rows in (1, 2, 5, 17, 60):
        assert torch.equal(changed(*(Span(1, ((n % 12, 1.0),)) for n in range(num_rows))), alone)
        assert torch.equal(changed(Span(num_rows, ((31, 1.0), (1, 1.0)))), alone)


def test_what_the_kernel_does_not_know_runs_beside_it() -> None:
    generator = torch.Generator().manual_seed(3)
    uses = drawn("vera", 7, generator)
    outer_NO = torch.randn(1, OUTS[0], generator=generator)
    dense = replace(dense_core(uses[0][2][0].basis, generator), outer_NO=outer_NO)
    p_NIP = uses[0][2][0].basis.p_NPI.transpose(1, 2).contiguous()
    turned = Basis(p_NIP.transpose(1, 2), uses[0][2][0].basis.q_NOQ)
    uses[0][2] += [dense, Projected("diagonal", torch.randn(1, 7, generator=generator), turned)]
    places = torch.zeros(1 << 16, dtype=torch.int64)
    crowded = Projected("sparse", torch.ones(1 << 16), uses[0][2][0].basis, places, places)
    assert _is_served(replace(crowded, rows_K=torch.arange(1 << 16) % 2))
    uses[0][2].append(crowded)
    assert [_is_served(part) for part in uses[0][2]] == [True, False, False, False]
    agree(uses, "mixes", generator)
    assert with_packed_basis(dense) is dense
    uses[0][2].remove(dense)
    agree_packed(uses, "mixes", generator)


def test_a_core_that_is_not_finite_spoils_its_own_rows_alone() -> None:
    generator, table = torch.Generator().manual_seed(4), RowTable(CROWDS["distinct"])
    uses = drawn("vera", 7, generator)
    x_TI = torch.randn(table.num_rows, IN, generator=generator)
    sound = NativeProjected().bind(uses, table).sums(x_TI)[0][0].values_NO
    uses[0][3][0].core.fill_(torch.inf)
    spoilt = NativeProjected().bind(uses, table).sums(x_TI)[0][0].values_NO
    others = torch.arange(12) != 3
    assert not spoilt[3].isfinite().any()
    assert torch.equal(spoilt[others], sound[others])
