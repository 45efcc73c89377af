"""The low-rank kernels against the twin: dtype, rank, rows and popularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.formats import FORMATS
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.triton import low_rank_groups
from timbre_server.operators.triton.launch import Precision
from timbre_server.operators.triton.low_rank import TritonLowRank

CROWDS: Mapping[str, Sequence[Span]] = {
    "identical": [Span(1, ((1, 1.0),))] * 9,
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (3, 0, 2, 1)],
    "uniform": [Span(1, ((slot, 1.0),)) for slot in (3, 0, 2, 1, 2)],
    "zipf": [Span(1, ((slot, 1.0),)) for slot in (0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1)],
    "mixes": [
        Span(1, ((0, 0.7), (1, 0.3))),
        Span(1),
        Span(18, ((2, 0.25), (0, 2.0), (3, 0.5))),
        Span(1, ((1, -1.5),)),
    ],
    "prefill": [Span(1, ((1, 1.0),)), Span(20, ((2, 1.0),)), Span(2)],
}
RANKS = (1, 8, 17, 3)
OUTPUTS = (40, 13)


def uses_of(
    in_features: int, twins: ModuleType, ranks: Sequence[int] = RANKS
) -> list[dict[int, list[LowRank]]]:
    """Adapter 0 has two parts wherever it acts, and the second member is adapted by adapters 0 and 3."""
    generator = torch.Generator().manual_seed(in_features)

    def part(rank: int, out: int) -> LowRank:
        a_RI = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        drawn: LowRank = twins.on_device(LowRank(a_RI, torch.randn(out, rank, generator=generator)))
        return drawn

    return [
        {slot: [part(ranks[slot], out) for _ in range(1 + (slot == 0))] for slot in slots}
        for out, slots in zip(OUTPUTS, (range(4), (0, 3)), strict=True)
    ]


def compare(
    twins: ModuleType,
    table: RowTable,
    uses: Sequence[Mapping[int, Sequence[LowRank]]],
    x_TI: Tensor,
    precision: Precision = "ieee",
    tolerance: float = 1e-5,
) -> None:
    outputs = [torch.zeros(table.num_rows, out, device=x_TI.device) for out in OUTPUTS]
    bound = TritonLowRank(precision).bind(uses, table)
    found = twins.totals(bound, x_TI, outputs)
    expected = twins.totals(LowRankOperator().bind(uses, table), x_TI.float(), outputs)
    for (_, change), (_, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(change, wanted, atol=tolerance, rtol=tolerance)


def rows(table: RowTable, in_features: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(table.num_rows)
    return torch.randn(table.num_rows, in_features, generator=generator).to(table.device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_crowd_gets_what_the_twin_gives(crowd: str, dtype: torch.dtype, twins: ModuleType) -> None:
    table = RowTable(CROWDS[crowd], twins.DEVICE)
    compare(twins, table, uses_of(45, twins), rows(table, 45, dtype))


@pytest.mark.parametrize("rank", [2, 15, 16, 64])
@pytest.mark.parametrize("num_rows", [1, 18])
def test_any_rank(num_rows: int, rank: int, twins: ModuleType) -> None:
    table = RowTable([Span(num_rows, ((1, 1.0),))], twins.DEVICE)
    compare(twins, table, uses_of(32, twins, (rank,) * 4), rows(table, 32))


@pytest.mark.parametrize("in_features", [576, 1037])
@pytest.mark.parametrize("num_rows", [1, 9])
def test_an_input_of_several_pieces(num_rows: int, in_features: int, twins: ModuleType) -> None:
    table = RowTable([Span(num_rows, ((1, 1.0),))], twins.DEVICE)
    compare(twins, table, uses_of(in_features, twins), rows(table, in_features))


@pytest.mark.parametrize("num_rows", [1, 9])
def test_outputs_of_several_blocks(num_rows: int, twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second member has none in the last of them."""
    for name in ("BY_ROW", "BY_TILE"):
        monkeypatch.setattr(low_rank_groups, name, replace(getattr(low_rank_groups, name), out=16))
    table = RowTable([Span(num_rows, ((0, 1.0),))], twins.DEVICE)
    compare(twins, table, uses_of(32, twins), rows(table, 32))


def test_many_rows_in_tall_tiles(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_groups, "MIN_ROWS_OF_TALL_TILES", 30)
    table = RowTable([Span(1), Span(70, ((0, 1.0), (2, 0.5)))], twins.DEVICE)
    compare(twins, table, uses_of(45, twins), rows(table, 45))


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32x3", 1e-4), ("tf32", 2e-2)])
def test_products_on_tensor_cores_are_as_close_as_they_say(
    precision: Precision, tolerance: float, twins: ModuleType
) -> None:
    table = RowTable([Span(9, ((2, 1.0),))], twins.DEVICE)
    compare(twins, table, uses_of(32, twins), rows(table, 32), precision, tolerance)


def test_tensors_that_lie_anywhere(twins: ModuleType) -> None:
    """Factors that begin off the beat or are no rows of memory, and an input of every other column."""
    table = RowTable(CROWDS["mixes"], twins.DEVICE)

    def moved(part: LowRank) -> LowRank:
        longer = torch.cat([part.a_RI.new_zeros(1), part.a_RI.flatten()])
        return LowRank(longer[1:].view_as(part.a_RI), part.b_OR.T.contiguous().T)

    uses = [{slot: [moved(part) for part in own] for slot, own in by.items()} for by in uses_of(32, twins)]
    compare(twins, table, uses, rows(table, 64)[:, ::2])


@pytest.mark.parametrize("crowd", ["distinct", "mixes", "prefill"])
@pytest.mark.parametrize("formats", [FORMATS[1:2], FORMATS[2:], FORMATS], ids=["bfloat16", "float16", "all"])
def test_factors_of_16_bits_give_the_bits_of_the_same_in_float32(
    formats: Sequence[torch.dtype], crowd: str, twins: ModuleType
) -> None:
    """Of adapters in formats of their own, and of one whose A and B differ."""
    table = RowTable(CROWDS[crowd], twins.DEVICE)
    count = len(formats)
    uses = [
        {
            slot: [
                LowRank(part.a_RI.to(formats[slot % count]), part.b_OR.to(formats[(slot + n) % count]))
                for n, part in enumerate(parts)
            ]
            for slot, parts in by_slot.items()
        }
        for by_slot in uses_of(45, twins)
    ]
    whole = [
        {s: [LowRank(part.a_RI.float(), part.b_OR.float()) for part in parts] for s, parts in by_slot.items()}
        for by_slot in uses
    ]
    x_TI = rows(table, 45)
    outputs = [torch.zeros(table.num_rows, out, device=x_TI.device) for out in OUTPUTS]
    found, expected = (twins.totals(TritonLowRank().bind(u, table), x_TI, outputs) for u in (uses, whole))
    for (_, change), (_, wanted) in zip(found, expected, strict=True):
        assert torch.equal(change, wanted)


def test_a_step_that_is_run_again_gives_equal_bits(twins: ModuleType) -> None:
    table = RowTable(CROWDS["mixes"], twins.DEVICE)
    bound = TritonLowRank().bind(uses_of(32, twins), table)
    x_TI = rows(table, 32)
    for before, after in zip(bound.sums(x_TI), bound.sums(x_TI), strict=True):
        assert torch.equal(before[0].values_NO, after[0].values_NO)


def test_a_decode_row_has_the_same_bits_alone_and_in_a_crowd(twins: ModuleType) -> None:
    uses = uses_of(600, twins)
    crowd = RowTable(CROWDS["distinct"], twins.DEVICE)
    x_TI = rows(crowd, 600)
    [[together], _] = TritonLowRank().bind(uses, crowd).sums(x_TI)
    alone = RowTable([CROWDS["distinct"][2]], twins.DEVICE)
    [[by_itself], _] = TritonLowRank().bind(uses, alone).sums(x_TI[2:3])
    assert torch.equal(together.values_NO[2], by_itself.values_NO[0])


def test_rows_of_the_base_are_not_named(twins: ModuleType) -> None:
    uses = uses_of(32, twins)
    spans = [Span(2), Span(1, ((0, 1.0),)), Span(1), Span(1, ((1, 1.0),))]
    table = RowTable(spans, twins.DEVICE)
    [[first], [second]] = TritonLowRank().bind(uses, table).sums(rows(table, 32))
    assert isinstance(first.rows_N, Tensor)
    assert (first.rows_N.tolist(), second.rows_N) == ([2, 4], slice(2, 3))


def test_a_table_of_base_rows_has_no_changes(twins: ModuleType) -> None:
    table = RowTable([Span(3)], twins.DEVICE)
    bound = TritonLowRank().bind(uses_of(32, twins), table)
    assert list(bound.sums(rows(table, 32))) == [[], []]
