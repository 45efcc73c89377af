"""What the shared tests of operators do not see of `Spectral`: dense formulas, and bases that are shared."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from timbre_methods.program import Places, Spectral, pattern_bytes
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.spectral import SpectralOperator


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9), (9, 15)], ids=str)
def test_a_spectral_part_equals_the_dense_inverse_transform(shape: tuple[int, int]) -> None:
    """FourierFT's own formula, ΔW = Re ifft2(S), built densely in double precision."""
    out_features, in_features = shape
    generator = torch.Generator().manual_seed(3)
    flat = torch.randperm(out_features * in_features, generator=generator)[:30]
    rows, columns = flat // in_features, flat % in_features
    c_N = torch.randn(30, generator=generator)
    dense = torch.zeros(out_features, in_features, dtype=torch.float64)
    dense[rows, columns] = c_N.double()
    delta_OI = torch.fft.ifft2(dense).real
    x_TI = torch.randn(5, in_features, generator=generator)

    part = Spectral(c_N, Places("dft", out_features, in_features, rows, columns))
    bound = SpectralOperator().bind([{0: [part]}], RowTable([Span(5, ((0, 1.0),))]))

    [[change]] = bound.sums(x_TI)
    torch.testing.assert_close(change.values_NO.double(), x_TI.double() @ delta_OI.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["dft", "dct", "hartley"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_adapters_of_one_basis_run_as_each_alone(name: str, is_mixed: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    rows, columns = (torch.randint(0, size, (40,), generator=generator) for size in (20, 12))
    places = Places(name, 20, 12, rows, columns)
    parts = [Spectral(torch.randn(40, generator=generator), places) for _ in range(6)]
    pairs = [((i, 1.0), ((i + 1) % 6, -0.5)) if is_mixed else ((i, 1.0),) for i in range(6)]
    x_TI = torch.randn(6, 12, generator=generator)
    operator = SpectralOperator()

    table = RowTable([Span(1, own) for own in pairs])
    [[change]] = operator.bind([{i: [part] for i, part in enumerate(parts)}], table).sums(x_TI)

    for row, own in enumerate(pairs):
        c_N = sum(weight * parts[i].c_N for i, weight in own)
        meaning = operator.meaning(replace(parts[0], c_N=c_N), x_TI[row : row + 1], torch.zeros(1, 20))
        expected = meaning.change_TO
        torch.testing.assert_close(change.values_NO[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_a_pattern_is_laid_out_once_for_all_and_for_no_longer_than_it_is_used() -> None:
    generator = torch.Generator().manual_seed(11)
    rows, columns = (torch.randint(0, size, (40,), generator=generator) for size in (20, 12))
    places = Places("dft", 20, 12, rows, columns)
    parts = {slot: [Spectral(torch.randn(40, generator=generator), places)] for slot in range(6)}
    operator = SpectralOperator()
    wide, narrow = (RowTable([Span(1, ((slot, 1.0),)) for slot in range(count)]) for count in (6, 2))

    bounds = [operator.bind([parts], table) for table in (wide, wide, narrow)]
    pattern = operator._pattern(places, torch.device("cpu"))
    assert pattern.latest is not None
    laid_out = pattern.latest()
    assert laid_out is not None
    assert (laid_out.pairs, len(laid_out.columns)) == (6, 6 * 2 * 40)
    assert pattern.laid_out(6) is laid_out

    x_TI = torch.randn(6, 12, generator=generator)
    [[change], [again], [first]] = [
        own for bound, rows in zip(bounds, (6, 6, 2), strict=True) for own in bound.sums(x_TI[:rows])
    ]
    assert torch.equal(again.values_NO, change.values_NO)
    torch.testing.assert_close(first.values_NO, change.values_NO[:2])

    del laid_out, bounds
    assert pattern.latest() is None


@pytest.mark.parametrize("name", ["dct", "hartley"])
@pytest.mark.parametrize("out_features", [20, 21])
def test_no_more_is_kept_of_an_adapters_own_places_than_counts(name: str, out_features: int) -> None:
    index_N, values_N = torch.tensor([0, 3, 11, 3, 7]), torch.ones(5)
    places = Places(name, out_features, 12, index_N, index_N, is_own=True)
    pattern = SpectralOperator()._pattern(places, torch.device("cpu"))
    kept = (pattern.row_ends, pattern.columns, pattern.source, pattern.factor)
    counted = pattern_bytes(Spectral(values_N, places))
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept) <= counted
    assert pattern_bytes(Spectral(values_N, replace(places, is_own=False))) == 0
