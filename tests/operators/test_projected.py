"""Adapters that share a basis: one product with it for all of them, whatever lies between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from timbre_methods.program import Basis, Projected
from timbre_server.operators import projected
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.row_table import RowTable, Span

IN, OUTS, P, Q, BLOCKS = 10, (12, 7), 5, 6, 3

CROWDS = {
    "one adapter": [Span(9, ((0, 1.0),))],
    "decode": [Span(1, ((slot, 1.0),)) for slot in (3, 0, 2, 1)],
    "one among base rows": [Span(2), Span(1, ((2, 1.0),)), Span(6)],
    "prefill beside decode": [Span(1, ((1, 1.0),)), Span(11, ((2, 1.0),)), Span(1), Span(5, ((0, 1.0),))],
    "an adapter in two places": [Span(1, ((1, 1.0),)), Span(2, ((0, 1.0),)), Span(4, ((1, 1.0),))],
    "mixes": [Span(2, ((0, 0.7), (1, 0.3))), Span(1), Span(9, ((2, 0.25), (0, 2.0), (3, -0.5)))],
}

# Form, blocks of P and of Q, and whether there are inner and outer vectors.
KINDS = {
    "diagonal": ("diagonal", 1, 1, False, False),
    "vera": ("diagonal", 1, 1, False, True),
    "blocks": ("diagonal", BLOCKS, BLOCKS, False, False),
    "blocks of Q": ("diagonal", 1, BLOCKS, False, False),
    "blocks of P": ("diagonal", BLOCKS, 1, False, False),
    "randlora wide": ("diagonal", 1, BLOCKS, True, False),
    "randlora tall": ("diagonal", BLOCKS, 1, False, True),
    "everything": ("diagonal", BLOCKS, BLOCKS, True, True),
    "dense": ("dense", 1, 1, False, False),
    "dense with vectors": ("dense", 1, 1, True, True),
    "sparse": ("sparse", 1, 1, False, False),
    "sparse with outer": ("sparse", 1, 1, False, True),
}


def parts(kind: str, slots: int, generator: torch.Generator) -> list[dict[int, list[Projected]]]:
    """For two members: all adapters in one basis, whose P is the same matrix at both."""
    form, p_blocks, q_blocks, has_inner, has_outer = KINDS[kind]
    blocks = max(p_blocks, q_blocks)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 2

    def part(basis: Basis, out_features: int) -> Projected:
        inner_NI = normal(blocks, IN) if has_inner else None
        outer_NO = normal(blocks, out_features) if has_outer else None
        if form == "diagonal":
            return Projected("diagonal", normal(blocks, P), basis, inner_NI=inner_NI, outer_NO=outer_NO)
        if form == "dense":
            return Projected("dense", normal(Q, P), basis, inner_NI=inner_NI, outer_NO=outer_NO)
        count = 4 + int(torch.randint(0, 9, (1,), generator=generator))
        rows_K = torch.randint(0, Q, (count,), generator=generator)
        columns_K = torch.randint(0, P, (count,), generator=generator)
        return Projected("sparse", normal(count), basis, rows_K, columns_K, inner_NI, outer_NO)

    p_NPI = normal(p_blocks, P, IN)
    members = []
    for member, out_features in enumerate(OUTS):
        basis = Basis(p_NPI, normal(q_blocks, out_features, P if form == "diagonal" else Q))
        own = range(slots) if member == 0 else (0, 3)
        members.append({slot: [part(basis, out_features)] for slot in own})
    return members


def expected(
    uses: Mapping[int, Sequence[Projected]], table: RowTable, x_TI: Tensor, out_features: int
) -> Tensor:
    y_TO, row = torch.zeros(table.num_rows, out_features), 0
    for span in table.spans:
        rows = slice(row, row + span.num_rows)
        for slot, weight in span.pairs:
            for part in uses.get(slot, ()):
                change_TO = ProjectedOperator().meaning(part, x_TI[rows], y_TO[rows]).change_TO
                assert change_TO is not None
                y_TO[rows] += weight * change_TO
        row += span.num_rows
    return y_TO


def check(uses: list[dict[int, list[Projected]]], crowd: str, generator: torch.Generator) -> None:
    table = RowTable(CROWDS[crowd])
    x_TI = torch.randn(table.num_rows, IN, generator=generator)
    sums = ProjectedOperator().bind(uses, table).sums(x_TI)
    for own, changes, out_features in zip(uses, sums, OUTS, strict=True):
        total = torch.zeros(table.num_rows, out_features)
        for change in changes:
            rows = torch.arange(table.num_rows)[slice(None) if change.rows_N is None else change.rows_N]
            total.index_add_(0, rows, change.values_NO)
        torch.testing.assert_close(total, expected(own, table, x_TI, out_features), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_share_a_basis_get_their_own_cores(kind: str, crowd: str) -> None:
    generator = torch.Generator().manual_seed(len(kind) + 100 * len(crowd))
    check(parts(kind, 4, generator), crowd, generator)


@pytest.mark.parametrize("kind", ["randlora wide", "randlora tall", "everything", "sparse"])
def test_large_inputs_are_worked_through_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two rows of vectors at once, or of the places of a core.
    cells = 2 * BLOCKS * max(IN, *OUTS) + 1 if kind != "sparse" else 25
    monkeypatch.setattr(projected, "MAX_CELLS", cells)
    scattered, sizes = projected._scattered, []

    def noted(part: Projected, z_CNP: Tensor) -> Tensor:
        sizes.append(len(z_CNP) * len(part.core))
        return scattered(part, z_CNP)

    monkeypatch.setattr(projected, "_scattered", noted)
    generator = torch.Generator().manual_seed(7)
    check(parts(kind, 4, generator), "prefill beside decode", generator)
    assert max(sizes, default=0) <= cells


def test_several_forms_and_bases_at_one_site_sum() -> None:
    generator = torch.Generator().manual_seed(8)
    together = [parts(kind, 4, generator) for kind in ("vera", "dense", "sparse", "randlora wide")]
    uses = [
        {slot: [part for parts_ in together for part in parts_[member].get(slot, ())] for slot in range(4)}
        for member in range(2)
    ]
    check(uses, "mixes", generator)


@pytest.mark.parametrize("kind", ["vera", "dense", "sparse", "randlora tall"])
def test_p_runs_once_for_all_adapters_and_members(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    shrunk = projected._shrunk

    def counted(p_NPI: Tensor, x_TI: Tensor) -> Tensor:
        calls.append(len(x_TI))
        return shrunk(p_NPI, x_TI)

    monkeypatch.setattr(projected, "_shrunk", counted)
    generator = torch.Generator().manual_seed(9)
    table = RowTable([Span(2), *CROWDS["mixes"]])
    bound = ProjectedOperator().bind(parts(kind, 4, generator), table)
    bound.sums(torch.randn(table.num_rows, IN, generator=generator))
    # Rows 0, 1 and 4 are the base's.
    assert calls == [11]


def test_rows_of_a_mix_meet_q_once() -> None:
    generator = torch.Generator().manual_seed(10)
    table = RowTable(CROWDS["mixes"])
    bound = ProjectedOperator().bind(parts("dense", 4, generator), table)
    [[change], _] = bound.sums(torch.randn(table.num_rows, IN, generator=generator))
    assert change.values_NO.shape == (11, OUTS[0])
