"""The spectral kernels against the fast transforms of the twin."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import pytest
import torch

from timbre_methods.program import Places, Spectral
from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.operators import pooling
from timbre_server.operators.materialise import materialise
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.triton.spectral import BoundSpectra, TritonSpectral

Name = Literal["dft", "dct", "hartley", "dwt"]


def part(
    name: Name, shape: tuple[int, int], generator: torch.Generator, places: Places | None = None
) -> Spectral:
    """Twelve coefficients; equal places happen."""
    rows, columns = (torch.randint(0, size, (12,), generator=generator) for size in shape)
    own = Places(name, *shape, rows, columns, LOW_PASS["db2"] if name == "dwt" else ())
    return Spectral(torch.randn(12, generator=generator), places or own)


@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
def test_every_crowd_gets_what_the_twin_gives(crowd: str, twins: ModuleType) -> None:
    bound = twins.check(
        TritonSpectral(), SpectralOperator(), lambda out, g: part("dft", (out, 18), g), crowd, 18
    )
    assert isinstance(bound, BoundSpectra)


@pytest.mark.parametrize(("name", "length"), [("dft", 15), ("dct", 15), ("dct", 16), ("hartley", 16)])
def test_each_transform_of_an_even_and_an_odd_length(name: Name, length: int, twins: ModuleType) -> None:
    bound = twins.check(
        TritonSpectral(),
        SpectralOperator(),
        lambda out, g: part(name, (out, length), g),
        "mixes",
        length,
    )
    assert isinstance(bound, BoundSpectra)


def test_adapters_share_places_or_have_their_own(twins: ModuleType) -> None:
    shared = {out: part("dft", (out, 18), torch.Generator().manual_seed(out)).places for out in twins.OUTPUTS}

    def draw(out: int, generator: torch.Generator) -> Spectral:
        is_shared = torch.rand((), generator=generator) < 0.5
        return part("dft", (out, 18), generator, shared[out] if is_shared else None)

    bound = twins.check(TritonSpectral(), SpectralOperator(), draw, "mixes", 18)
    assert isinstance(bound, BoundSpectra)


def test_transforms_are_mixed_and_wavelets_are_left_to_the_twin(twins: ModuleType) -> None:
    names: list[Name] = ["dft", "dwt", "dct"]

    def draw(out: int, generator: torch.Generator) -> Spectral:
        return part(names[int(torch.randint(0, 3, (1,), generator=generator))], (out, 18), generator)

    bound = twins.check(TritonSpectral(), SpectralOperator(), draw, "mixes", 18)
    assert not isinstance(bound, BoundSpectra)


@pytest.mark.parametrize("name", ["dft", "dct", "hartley"])
@pytest.mark.parametrize("length", [1, 2, 43, 131, 1536, 6001])
def test_rows_of_any_length_go_there_and_back(name: Name, length: int, twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(length)
    x_TI = torch.randn(2, length, generator=generator).to(twins.DEVICE)
    places = Places(name, length, length, torch.tensor([length - 1, 0]), torch.tensor([0, length // 2]))
    parts = {0: [Spectral(torch.tensor([2.0, -1.0], device=twins.DEVICE), places)]}
    table = RowTable([Span(1, ((0, 1.0),)), Span(1)], twins.DEVICE)
    bound, twin = TritonSpectral().bind([parts], table), SpectralOperator().bind([parts], table)
    assert isinstance(bound, BoundSpectra)
    torch.testing.assert_close(
        bound.sums(x_TI)[0][0].values_NO, twin.sums(x_TI)[0][0].values_NO, atol=2e-6, rtol=1e-5
    )


def test_a_bind_without_room_is_the_twins(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    table = RowTable([Span(1, ((0, 1.0),))], twins.DEVICE)
    own = twins.on_device(part("dft", (8, 16), generator))
    monkeypatch.setattr(pooling, "MAX_POOLED_BYTES", 0)
    crowded = TritonSpectral().bind([{0: [own]}], table)
    assert not isinstance(crowded, BoundSpectra)


def test_places_that_crowd_in_one_frequency_are_the_twins(twins: ModuleType) -> None:
    here, everywhere = torch.full((300,), 3), torch.arange(300) % 64
    for rows, is_even in ((here, False), (everywhere, True)):
        crowded = Spectral(torch.ones(300), Places("dft", 64, 64, rows, everywhere))
        table = RowTable([Span(1, ((0, 1.0),))], twins.DEVICE)
        bound = TritonSpectral().bind([{0: [twins.on_device(crowded)]}], table)
        assert isinstance(bound, BoundSpectra) is is_even


def test_equal_runs_give_equal_bits(twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = {slot: [twins.on_device(part("dft", (12, 16), generator))] for slot in range(2)}
    bound = TritonSpectral().bind([parts], RowTable([Span(2, ((0, 0.3), (1, 0.7)))], twins.DEVICE))
    x_TI = torch.randn(2, 16, generator=generator).to(twins.DEVICE)

    assert torch.equal(bound.sums(x_TI)[0][0].values_NO, bound.sums(x_TI)[0][0].values_NO)


def test_gates_are_read_when_it_runs(twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(6)
    table = RowTable([Span(2, ((0, 1.0),)), Span(1, ((0, 1.0), (1, 1.0)))], twins.DEVICE, is_gated=True)
    parts = {slot: [twins.on_device(part("dft", (12, 16), generator))] for slot in range(2)}
    x_TI = torch.randn(3, 16, generator=generator).to(twins.DEVICE)
    bound, twin = TritonSpectral().bind([parts], table), SpectralOperator().bind([parts], table)

    for segment in table.segments:
        segment.weights_N.copy_(torch.rand(len(segment.weights_N), generator=generator))

    torch.testing.assert_close(bound.sums(x_TI)[0][0].values_NO, twin.sums(x_TI)[0][0].values_NO)


def test_the_dense_change_is_made_by_the_same_kernels(twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(4)
    parts_S = [[twins.on_device(part("dft", (6, 4), generator))] for _ in range(2)]

    delta_SOI = materialise(parts_S, (6, 4), [TritonSpectral()])

    torch.testing.assert_close(delta_SOI, materialise(parts_S, (6, 4), [SpectralOperator()]))
