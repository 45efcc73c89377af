"""Circulant blocks in C++ against PyTorch: how many rows and pieces, which sizes, who shares, who mixes."""

from __future__ import annotations

import pytest
import torch
from crowds import CROWDS
from torch import Tensor

from timbre_methods.program import Circulant
from timbre_server.operators.circulant import CirculantOperator
from timbre_server.operators.native.circulant import NativeCirculant
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

Uses = list[dict[int, list[Circulant]]]

EVERY = range(12)


def part(b: int, num_out: int, num_in: int, generator: torch.Generator) -> Circulant:
    return Circulant(torch.randn(num_out, num_in, b // 2 + 1, 2, generator=generator) / b, b)


def agree(uses: Uses, num_in: int, spans: list[Span], generator: torch.Generator) -> None:
    table = RowTable(spans)
    x_TI = torch.randn(table.num_rows, num_in, generator=generator)
    each = [operator.bind(uses, table).sums(x_TI) for operator in (NativeCirculant(), CirculantOperator())]
    for member, own in enumerate(uses):
        first = next(iter(own.values()))[0]
        y_TO = torch.zeros(table.num_rows, first.block_size * first.spectrum_MNK2.shape[0])
        native, plain = y_TO, y_TO.clone()
        for sums, sum_TO in zip(each, (native, plain), strict=True):
            for change in sums[member]:
                change.add_to(sum_TO)
        torch.testing.assert_close(native, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("pieces", [(1, 1), (3, 8), (17, 5)], ids=str)
@pytest.mark.parametrize("b", [1, 2, 3, 4, 6, 12, 16, 22, 32, 36, 91, 192, 256, 257])
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_crowd_gets_what_pytorch_gives(crowd: str, b: int, pieces: tuple[int, int]) -> None:
    """257 is a prime number: the plain operator takes it."""
    generator, (num_out, num_in) = torch.Generator().manual_seed(b), pieces
    # The second member is adapted by only some of them, and by slot 0 twice.
    uses = [
        {slot: [part(b, count, num_in, generator) for _ in range(1 + (slot == 0))] for slot in slots}
        for count, slots in ((num_out, EVERY), (2, (0, 2, 7)))
    ]
    agree(uses, num_in * b, CROWDS[crowd], generator)


@pytest.mark.parametrize("crowd", CROWDS)
def test_adapters_may_have_blocks_of_several_sizes(crowd: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sizes = [1, 2, 3, 6, 12, 24]
    uses = [
        {
            slot: [
                part(b, out // b, 48 // b, generator) for b in (sizes[slot % 6], sizes[(slot + member) % 4])
            ]
            for slot in EVERY
        }
        for member, out in enumerate((72, 24))
    ]
    agree(uses, 48, CROWDS[crowd], generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("b", "num_out", "num_in"),
    [(4, 5, 6), (10, 3, 2), (48, 7, 3), (192, 3, 8), (1, 5, 6), (9, 4, 3), (86, 3, 2), (209, 2, 3)],
)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(
    b: int, num_out: int, num_in: int, dtype: torch.dtype
) -> None:
    """Alone, among few or among many of other adapters, and among others of its own."""
    generator = torch.Generator().manual_seed(7)
    parts = {slot: [part(b, num_out, num_in, generator)] for slot in range(16)}
    x_TI = torch.randn(40, num_in * b, generator=generator).to(dtype)
    operator = NativeCirculant()

    def outputs_of(rows: list[int], slots: list[int]) -> Tensor:
        bound = operator.bind([parts], RowTable([Span(1, ((slot, 0.7),)) for slot in slots]))
        adds = bound.adds(0)
        assert adds is not None
        assert adds.sums is not None
        y_TO = torch.zeros(len(rows), num_out * b)
        adds.sums(bound.source(x_TI[rows].contiguous()), y_TO)
        return y_TO

    everything, slots = list(range(40)), [row % 16 for row in range(40)]
    expected = outputs_of(everything, slots)
    for count in (1, 3, 8, 11, 17):
        assert torch.equal(outputs_of(everything[:count], slots[:count]), expected[:count])
    for count in (2, 7, 40):
        assert torch.equal(outputs_of(everything[:count], [0] * count)[0], expected[0])


LARGE = (4864, 9728, 11008, 13696, 17408, 18944, 29568)
"""Of the middle layers of well-known models: times 19, 19, 43, 107, 17, 37 and 3 * 7 * 11."""


@pytest.mark.parametrize("b", [*range(1, 140), 2 * 251, 11 * 13 * 4, 3 * 2 * 43, 37 * 37, *LARGE])
def test_transforms_of_any_length_are_those_of_double_precision(b: int) -> None:
    generator = torch.Generator().manual_seed(b)
    own = part(b, 1, 1, generator)
    x_TI = torch.randn(9, b, generator=generator)
    found_TO = (
        NativeCirculant().bind([{0: [own]}], RowTable([Span(9, ((0, 1.0),))])).sums(x_TI)[0][0].values_NO
    )
    product_TK = torch.view_as_complex(own.spectrum_MNK2[0, 0].double()) * torch.fft.rfft(x_TI.double())
    expected_TO = torch.fft.irfft(product_TK, n=b)
    assert (found_TO - expected_TO).norm() < 1e-6 * expected_TO.norm()


def test_spectra_that_are_not_finite_spoil_their_own_rows_alone() -> None:
    generator, table = torch.Generator().manual_seed(4), RowTable(CROWDS["distinct"])
    uses = [{slot: [part(12, 2, 3, generator)] for slot in EVERY}]
    x_TI = torch.randn(table.num_rows, 36, generator=generator)
    sound = NativeCirculant().bind(uses, table).sums(x_TI)[0][0].values_NO
    uses[0][3][0].spectrum_MNK2.fill_(torch.inf)
    spoilt = NativeCirculant().bind(uses, table).sums(x_TI)[0][0].values_NO
    others = torch.arange(12) != 3
    assert not spoilt[3].isfinite().any()
    assert torch.equal(spoilt[others], sound[others])


def test_spectra_are_read_where_they_lie() -> None:
    """An adapter takes its own bytes, and no more."""
    generator = torch.Generator().manual_seed(5)
    own = part(12, 2, 3, generator)
    bound = NativeCirculant().bind([{0: [own]}], RowTable([Span(2, ((0, 1.0),))]))
    x_TI = torch.randn(2, 36, generator=generator)
    assert bound.sums(x_TI)[0][0].values_NO.any()
    own.spectrum_MNK2.zero_()
    assert not bound.sums(x_TI)[0][0].values_NO.any()
