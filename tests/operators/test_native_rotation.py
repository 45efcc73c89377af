"""Rotations in C++: a row's bits, in place and through any shape of blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from timbre_methods.program import Rotation
from timbre_server.operators.native.rotation import NativeRotation
from timbre_server.operators.rotation import narrowed
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

SHAPES = {
    "blocks of 2, apart": ((2, 30, 2, 2), (60, 2)),
    "blocks of 15": ((1, 4, 15, 15), (15,)),
    "blocks of 20, apart": ((1, 3, 20, 20), (60,)),
    "a block for all thirds": ((1, 1, 20, 20), (20,)),
    "one block": ((1, 1, 60, 60), (60,)),
}
NUM_PARTS = 2 * len(SHAPES)
FEATURES, ROWS = 60, 45


def parts() -> dict[int, list[Rotation]]:
    """An adapter for each shape, in order, and one with the same narrowed; the first has another part."""
    generator = torch.Generator().manual_seed(3)
    found = [
        [Rotation("input", torch.randn(shape, generator=generator) / shape[-1] ** 0.5, chunks)]
        for shape, chunks in SHAPES.values()
    ]
    found += [[narrowed(part) for part in own] for own in found]
    found[0] += found[1]
    return dict(enumerate(found))


def rows() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(4))


def turned(spans: list[Span], x_TI: Tensor, own: dict[int, list[Rotation]] | None = None) -> Tensor:
    """In place."""
    adds = NativeRotation().bind([own or parts()], RowTable(spans)).adds(0)
    assert adds is not None
    assert adds.input_change is not None
    y_TI = x_TI.clone()
    adds.input_change.add(y_TI, y_TI)
    return y_TI


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("slot", range(NUM_PARTS))
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(slot: int) -> None:
    x_TI = rows()
    every_TI = turned([Span(ROWS, ((slot, 0.7),))], x_TI)
    for row in (0, 7, ROWS - 1):
        assert torch.equal(turned([Span(1, ((slot, 0.7),))], x_TI[row : row + 1])[0], every_TI[row])
    others = [Span(1, ((n % NUM_PARTS, 1.0),)) for n in range(7)]
    assert torch.equal(turned([*others, Span(1, ((slot, 0.7),))], x_TI[:8])[7], every_TI[7])


@pytest.mark.usefixtures("threads")
def test_in_place_every_part_reads_what_the_row_was() -> None:
    spans = [Span(3, ((0, 0.5), (9, 2.0))), Span(1), Span(1, ((1, 1.0), (7, 1.0), (3, -1.0)))]
    x_TI, operator = rows()[:5], NativeRotation()
    expected_TI = x_TI.clone()
    start = 0
    for span in spans:
        own_TI = x_TI[start : start + span.num_rows]
        for slot, weight in span.pairs:
            for part in parts()[slot]:
                change_TI = operator.meaning(part, own_TI, own_TI).input_change_TI
                assert change_TI is not None
                expected_TI[start : start + span.num_rows] += weight * change_TI
        start += span.num_rows
    found_TI = turned(spans, x_TI)
    torch.testing.assert_close(found_TI, expected_TI, atol=2e-5, rtol=2e-5)
    assert torch.equal(found_TI[3], x_TI[3])


TILED = {
    "blocks of 16": ((1, 6, 16, 16), (16,)),
    "a block of 32 for all thirds": ((1, 1, 32, 32), (32,)),
    "blocks of 32": ((1, 3, 32, 32), (32,)),
    "one block": ((1, 1, 96, 96), (96,)),
    "in float32": ((1, 3, 32, 32), (32,)),
    "of 2 factors": ((2, 3, 32, 32), (32, 96)),
}
"""What the matrix unit may multiply, and what it does not."""


def tiled_parts() -> dict[int, list[Rotation]]:
    generator = torch.Generator().manual_seed(5)
    whole = [
        Rotation("input", torch.eye(shape[-1]) + torch.randn(shape, generator=generator) / 8, chunks)
        for shape, chunks in TILED.values()
    ]
    named = zip(TILED, whole, strict=True)
    return {n: [part if name == "in float32" else narrowed(part)] for n, (name, part) in enumerate(named)}


def of_chunks() -> list[Span]:
    one_each = [Span(33 + 2 * slot, ((slot, 0.5 + slot),), in_chunk=True) for slot in range(len(TILED))]
    mixes = [Span(9, ((2, 0.5), (4, 2.0)), in_chunk=True), Span(40, ((0, 1.0), (1, -1.0)), in_chunk=True)]
    return [*one_each, *mixes, Span(1, ((1, 1.0),)), Span(1, ((2, 1.0),), in_chunk=True)]


@pytest.mark.usefixtures("threads")
def test_rows_of_chunks_have_the_same_bits_whatever_rows_are_beside_them() -> None:
    spans, own = of_chunks(), tiled_parts()
    generator = torch.Generator().manual_seed(6)
    xs = [torch.randn(span.num_rows, 96, generator=generator) for span in spans]
    alone = [turned([span], x, own) for span, x in zip(spans, xs, strict=True)]
    for order in (range(len(spans)), range(len(spans) - 1, -1, -1), (2, 8, 2, 9, 6, 2)):
        crowd = [Span(5, in_chunk=True), *(spans[n] for n in order)]
        x_TI = torch.cat([torch.ones(5, 96), *(xs[n] for n in order)])
        base, *found = turned(crowd, x_TI, own).split([span.num_rows for span in crowd])
        assert torch.equal(base, torch.ones(5, 96))
        for n, got in zip(order, found, strict=True):
            assert torch.equal(got, alone[n]), spans[n]
    for span, x, whole in zip(spans, xs, alone, strict=True):
        if span.in_chunk:
            pieces = [turned([replace(span, num_rows=len(piece))], piece, own) for piece in x.split(13)]
            assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.usefixtures("threads")
def test_rows_of_chunks_are_turned_as_blocks_say() -> None:
    own, operator = tiled_parts(), NativeRotation()
    for span in of_chunks():
        x_TI = torch.randn(span.num_rows, 96, generator=torch.Generator().manual_seed(7))
        expected_TI = x_TI.clone()
        for slot, weight in span.pairs:
            change_TI = operator.meaning(own[slot][0], x_TI, x_TI).input_change_TI
            assert change_TI is not None
            expected_TI += weight * change_TI
        torch.testing.assert_close(turned([span], x_TI, own), expected_TI, atol=2e-4, rtol=2e-5)
