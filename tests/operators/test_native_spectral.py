"""`Spectral` in C++ of any transform, where adapters' coefficients sit at places of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from crowds import CROWDS
from torch import Tensor

from timbre_methods.program import Places, Spectral, pattern_bytes
from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.operators.contract import Uses
from timbre_server.operators.native.spectral import NativeSpectral
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.spectral import SpectralOperator

pytestmark = pytest.mark.cpp

Transform = Literal["dft", "dct", "hartley", "dwt"]
TRANSFORMS: tuple[Transform, ...] = ("dft", "dct", "hartley", "dwt")


def places_of(transform: Transform, outer: int, inner: int, generator: torch.Generator) -> Places:
    """Equal places happen."""
    rows_N, columns_N = (torch.randint(n, (60,), generator=generator) for n in (outer, inner))
    low_pass = LOW_PASS["db2"] if transform == "dwt" else ()
    return Places(transform, outer, inner, rows_N, columns_N, low_pass)


def added(operator: SpectralOperator, uses: Uses[Spectral], table: RowTable, x_TI: Tensor) -> list[Tensor]:
    """Each member's changes, summed."""
    found = []
    for changes, own in zip(operator.bind(uses, table).sums(x_TI), uses, strict=True):
        part = next(part for parts in own.values() for part in parts)
        found.append(torch.zeros(table.num_rows, part.places.out_features))
        for change in changes:
            change.add_to(found[-1])
    return found


def check(members: Sequence[tuple[int, Sequence[int]]], inner: int, crowd: str, *, same: bool) -> None:
    """Members of a size, which these adapters change; the transform of each is another one's, or the same."""
    generator = torch.Generator().manual_seed(inner)
    uses = [
        {
            slot: [
                Spectral(
                    torch.randn(60, generator=generator),
                    places_of(TRANSFORMS[0 if same else slot % 4], outer, inner, generator),
                )
                for _ in range(1 + (slot == 0))
            ]
            for slot in slots
        }
        for outer, slots in members
    ]
    table = RowTable(CROWDS[crowd])
    x_TI = torch.randn(table.num_rows, inner, generator=generator)
    native, plain = (
        added(operator, uses, table, x_TI) for operator in (NativeSpectral(), SpectralOperator())
    )
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize(
    ("inner", "outer"), [(576, 192), (48, 70), (14, 2), (2048, 90), (26, 86), (15, 121), (514, 12)]
)
@pytest.mark.parametrize("same", [True, False])
def test_adapters_with_places_of_their_own_add_what_each_would_alone(
    inner: int, outer: int, crowd: str, same: bool
) -> None:
    """The second member is changed by some of them, and the first one by one of them twice."""
    check([(outer, range(12)), (outer, (0, 2, 7))], inner, crowd, same=same)


@pytest.mark.parametrize("transform", TRANSFORMS)
@torch.inference_mode()
def test_a_row_has_the_same_bits_whether_those_beside_it_share_its_places_or_not(
    transform: Transform,
) -> None:
    generator = torch.Generator().manual_seed(3)
    places = [places_of(transform, 96, 576, generator) for _ in range(12)]
    values = [torch.randn(60, generator=generator) for _ in range(12)]
    x_TI = torch.randn(12, 576, generator=generator)
    table = RowTable(CROWDS["distinct"])

    def first_row(places: Sequence[Places]) -> Tensor:
        parts = {slot: [Spectral(values[slot], own)] for slot, own in enumerate(places)}
        return added(NativeSpectral(), [parts], table, x_TI)[0][0]

    alone = added(
        NativeSpectral(), [{0: [Spectral(values[0], places[0])]}], RowTable([Span(1, ((0, 1.0),))]), x_TI[:1]
    )[0][0]
    assert torch.equal(first_row(places[:1] * 12), alone)
    assert torch.equal(first_row(places), alone)


@pytest.mark.parametrize("name", ["dct", "hartley"])
def test_no_more_is_kept_of_an_adapters_own_places_than_counts(name: Transform) -> None:
    index_N = torch.tensor([0, 3, 11, 3, 7])
    places = Places(name, 20, 12, index_N, index_N, is_own=True)
    pattern = NativeSpectral().lane_pattern(places)
    kept = sum(tensor.nbytes for tensor in (pattern._sums_K3, pattern._entries_N3))
    assert kept == pattern_bytes(Spectral(torch.ones(5), places))


@pytest.mark.parametrize(("row", "column"), [(-1, 0), (20, 0), (0, -1), (0, 12)])
def test_a_frequency_that_a_transform_does_not_have_is_refused(row: int, column: int) -> None:
    wrong = Places("dct", 20, 12, torch.tensor([3, row]), torch.tensor([5, column]), is_own=True)
    with pytest.raises(ValueError, match=r"not in \[0, 20\) or \[0, 12\)"):
        NativeSpectral().lane_pattern(wrong)
