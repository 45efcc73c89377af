"""Operators in C++ where they do something of their own; `test_operators` holds them to the laws of all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from timbre_methods.program import LowRank, Part, Places, Sparse, Spectral
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.native.formats import FORMATS
from timbre_server.operators.agreement import wrong_operator
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.contract import Operator
from timbre_server.operators.native.catalogue import operators
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.sliced_ellpack import slices_of

pytestmark = pytest.mark.cpp

CROWDS = {
    "decode": [Span(1, ((slot, 1.0),)) for slot in range(11)],
    "prefill beside decode": [Span(45, ((1, 1.0),)), Span(1), Span(1, ((2, 1.0),)), Span(9, ((0, 0.5),))],
    "mixes": [
        Span(1, ((0, 0.7), (1, 0.3))),
        Span(19, ((2, 0.25), (0, 2.0))),
        Span(1, ((10, -1.0),)),
        Span(1),
    ],
}


def operator_of(part: type[Part], kernels: str) -> Operator[Part]:
    found = all_operators(kernels=kernels)  # type: ignore[arg-type]
    return next(operator for operator in found if operator.part is part)


def in_features(part: Part) -> int:
    match part:
        case Spectral():
            return part.places.in_features
        case SlicedEllpack():
            return part.in_features
        case LowRank():
            return part.a_RI.shape[1]
    raise AssertionError(part)


def added(
    operator: Operator[Part], uses: list[dict[int, list[Part]]], crowd: str, y: list[Tensor]
) -> list[Tensor]:
    """Each member's output with its changes, from the same random input."""
    table = RowTable(CROWDS[crowd])
    first = next(part for own in uses for parts in own.values() for part in parts)
    x_TI = torch.randn(table.num_rows, in_features(first), generator=torch.Generator().manual_seed(1))
    sums = operator.bind(uses, table).sums(x_TI)
    found = [y_TO.clone() for y_TO in y]
    for changes, y_TO in zip(sums, found, strict=True):
        for change in changes:
            change.add_to(y_TO)
    return found


def outputs(crowd: str, *sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(RowTable(CROWDS[crowd]).num_rows, size, generator=generator) for size in sizes]


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize(
    ("inner", "outer"), [(576, 192), (48, 70), (14, 2), (2048, 90), (22, 24), (15, 12), (2, 1), (514, 12)]
)
def test_adapters_of_one_seed_run_side_by_side_as_each_would_alone(
    crowd: str, inner: int, outer: int
) -> None:
    """514 has the factor 257: the plain operator takes it."""
    generator = torch.Generator().manual_seed(inner)
    rows, columns = (torch.randint(n, (60,), generator=generator) for n in (outer, inner))
    places = Places("dft", outer, inner, rows, columns)
    # The second member is adapted by only some of them, and by slot 0 twice.
    uses: list[dict[int, list[Part]]] = [
        {
            slot: [Spectral(torch.randn(60, generator=generator), places) for _ in range(1 + (slot == 0))]
            for slot in slots
        }
        for slots in (range(11), (0, 2, 7))
    ]
    y = outputs(crowd, outer, outer)
    native, plain = (added(operator_of(Spectral, kernels), uses, crowd, y) for kernels in ("native", "torch"))
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_spectrum_that_is_not_finite_spoils_its_own_rows_alone(bad: float) -> None:
    places = Places("dft", 24, 48, torch.arange(20), torch.arange(20))
    uses: list[dict[int, list[Part]]] = [{slot: [Spectral(torch.ones(20), places)] for slot in range(11)}]
    y = outputs("decode", 24)
    sound = added(operator_of(Spectral, "native"), uses, "decode", y)[0]
    uses[0][3] = [Spectral(torch.full((20,), bad), places)]
    spoilt = added(operator_of(Spectral, "native"), uses, "decode", y)[0]
    others = torch.arange(11) != 3
    assert not spoilt[3].isfinite().any()
    assert torch.equal(spoilt[others], sound[others])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_gets_the_same_bits_whatever_rows_are_beside_it(dtype: torch.dtype) -> None:
    """Alone, among few or among many of other adapters, and among others of its own."""
    generator = torch.Generator().manual_seed(7)
    places = Places("dft", 96, 576, *(torch.randint(n, (200,), generator=generator) for n in (96, 576)))
    parts = {slot: [Spectral(torch.randn(200, generator=generator), places)] for slot in range(16)}
    x_TI = torch.randn(16, 576, generator=generator).to(dtype)
    operator = operator_of(Spectral, "native")

    def outputs_of(rows: list[int], slots: list[int]) -> Tensor:
        bound = operator.bind([parts], RowTable([Span(1, ((slot, 1.0),)) for slot in slots]))
        adds = bound.adds(0)
        assert adds is not None
        assert adds.sums is not None
        y_TO = torch.zeros(len(rows), 96)
        adds.sums(bound.source(x_TI[rows].contiguous()), y_TO)
        return y_TO

    everything = list(range(16))
    expected = outputs_of(everything, everything)
    for count in (1, 3, 8, 11):
        assert torch.equal(outputs_of(everything[:count], everything[:count]), expected[:count])
    assert torch.equal(outputs_of(everything, [5] * 16)[5], expected[5])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [0, 1, 3, 8, 12, 33])
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_rank_gives_what_pytorch_gives_and_base_rows_keep_their_bits(rank: int, crowd: str) -> None:
    generator = torch.Generator().manual_seed(rank)
    # Slices of larger tensors: not contiguous.
    uses: list[dict[int, list[Part]]] = [
        {
            slot: [
                LowRank(
                    torch.randn(rank, 60, generator=generator)[:, :43],
                    torch.randn(rank, 21, generator=generator).T,
                )
            ]
            for slot in range(11)
        }
    ]
    y = outputs(crowd, 21)
    y[0][:, 0] = -0.0
    native, plain = (
        added(operator_of(LowRank, kernels), uses, crowd, y)[0] for kernels in ("native", "torch")
    )
    torch.testing.assert_close(native, plain, atol=1e-4, rtol=1e-4)
    row = 0
    for span in CROWDS[crowd]:
        if not span.pairs:
            assert torch.equal(native[row].signbit(), y[0][row].signbit())
            assert torch.equal(native[row], y[0][row])
        row += span.num_rows


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("longest", [1, 20, 700, 3000])
def test_outputs_of_few_and_of_many_entries_are_summed(crowd: str, longest: int) -> None:
    """21 outputs: two slices and a half."""
    generator = torch.Generator().manual_seed(longest)
    uses: list[dict[int, list[Part]]] = [{}]
    for slot in range(11):
        ends = torch.randint(longest + 1, (21,), generator=generator).cumsum(0)
        row_ends = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        columns = torch.randint(43, (int(ends[-1]),), generator=generator, dtype=torch.int32)
        values = torch.randn(len(columns), generator=generator).to(FORMATS[slot % 3]).float()
        uses[0][slot] = [slices_of(Sparse(row_ends, columns, values, 43))]
    y = outputs(crowd, 21)
    native, plain = (
        added(operator_of(SlicedEllpack, kernels), uses, crowd, y)[0] for kernels in ("native", "torch")
    )
    torch.testing.assert_close(native, plain, atol=2e-4, rtol=1e-4)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values_dtype", FORMATS)
def test_a_row_of_sparse_changes_has_the_same_bits_whatever_rows_are_beside_it(
    dtype: torch.dtype, values_dtype: torch.dtype
) -> None:
    """45 of one adapter are 32, eight and five."""
    generator = torch.Generator().manual_seed(4)
    cells = torch.randperm(70 * 43, generator=generator)[:900].sort().values
    row_ends, values = torch.searchsorted(cells, torch.arange(71) * 43), torch.randn(900, generator=generator)
    part = slices_of(Sparse(row_ends, (cells % 43).int(), values.to(values_dtype).float(), 43))
    part = replace(part, values_KC=part.values_KC.to(values_dtype))
    x_TI = torch.randn(45, 43, generator=generator).to(dtype)

    def changes(first: int, count: int) -> Tensor:
        table = RowTable([Span(count, ((0, 0.7),))])
        bound = operator_of(SlicedEllpack, "native").bind([{0: [part]}], table)
        return bound.sums(x_TI[first : first + count])[0][0].values_NO

    assert torch.equal(changes(0, 45), torch.cat([changes(row, 1) for row in range(45)]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [1, 8, 13])
@pytest.mark.parametrize("crowd", CROWDS)
def test_factors_of_16_bits_give_the_bits_of_the_same_in_float32(rank: int, crowd: str) -> None:
    """Whatever the formats of A and B; some of float16 are below the normal numbers, or minus zero."""
    generator = torch.Generator().manual_seed(rank)
    formats = [(a, b) for a in FORMATS for b in FORMATS]

    def factor(dtype: torch.dtype, *shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator)
        values[:, ::3] *= 2.0**-16
        values[:, ::4] *= -0.0
        return values.to(dtype)

    parts = {
        slot: [LowRank(factor(formats[slot % 9][0], rank, 43), factor(formats[slot % 9][1], 21, rank))]
        for slot in range(11)
    }
    whole = {slot: [LowRank(part.a_RI.float(), part.b_OR.float())] for slot, (part,) in parts.items()}
    y = outputs(crowd, 21)
    found, expected = (added(operator_of(LowRank, "native"), [uses], crowd, y)[0] for uses in (parts, whole))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rank", [1, 8, 13])
@pytest.mark.parametrize("crowd", ["decode", "prefill beside decode"])
def test_rows_of_bfloat16_give_what_the_same_in_float32_give(rank: int, crowd: str) -> None:
    """Through bfloat16 factors, for which there is arithmetic of its own; bit for bit whatever else runs."""
    generator = torch.Generator().manual_seed(rank)
    table, features = RowTable(CROWDS[crowd]), 2 * 64 + 11
    uses: dict[int, list[LowRank]] = {
        slot: [LowRank(*(torch.randn(shape, generator=generator).bfloat16() for shape in shapes))]
        for slot in range(11)
        for shapes in [((rank, features), (75, rank))]
    }
    bound = operator_of(LowRank, "native").bind([uses], table)
    adds = bound.adds(0)
    assert adds is not None
    add = adds.sums
    assert add is not None
    x_TI = torch.randn(table.num_rows, features, generator=generator).bfloat16()
    assert bound.source(x_TI).dtype is torch.bfloat16
    narrow_TO, wide_TO = torch.zeros(table.num_rows, 75), torch.zeros(table.num_rows, 75)
    add(bound.source(x_TI), narrow_TO)
    add(bound.source(x_TI.float()), wide_TO)
    torch.testing.assert_close(narrow_TO, wide_TO, atol=1e-3, rtol=1e-4)

    # In other formats the neighbours are others, and the row's own adapter is the same.
    others = {0: [as_float(part) for part in uses[0]], 2: [as_float(part) for part in uses[2]]}
    row = 0 if crowd != "decode" else 1
    for neighbours, rows in ((uses, [row]), (uses | others, list(range(table.num_rows)))):
        spans = [Span(1, ((1, 1.0),))] if len(rows) == 1 else CROWDS[crowd]
        beside = operator_of(LowRank, "native").bind([neighbours], RowTable(spans)).adds(0)
        assert beside is not None
        assert beside.sums is not None
        found_TO = torch.zeros(len(rows), 75)
        beside.sums(x_TI[rows].contiguous(), found_TO)
        assert torch.equal(found_TO[rows.index(row)], narrow_TO[row])
        if len(rows) > 1 and crowd != "decode":
            torch.testing.assert_close(found_TO, narrow_TO, atol=1e-3, rtol=1e-4)


def as_float(part: LowRank) -> LowRank:
    return LowRank(part.a_RI.float(), part.b_OR.float())


@pytest.mark.usefixtures("threads")
def test_operators_agree_with_pytorch_on_so_many_threads() -> None:
    assert wrong_operator(operators(), torch.device("cpu"), counts=(1, 3, 11, 40)) is None
