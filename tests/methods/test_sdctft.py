from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import AdapterProgram, Spectral
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.self_attn.q_proj"
VALUES = [1.0, -2.0, 0.5, 4.0, 0.25]
ROWS, COLUMNS = [0, 3, 3, 5, 3], [0, 0, 2, 4, 2]
"""Of a layer of 6 x 5, one place twice."""


def adapter(values: list[float], rows: list[int], columns: list[int]) -> dict[str, Tensor]:
    stem = f"base_model.model.{PATH}"
    return {
        f"{stem}.sdctft_coefficients": torch.tensor(values),
        f"{stem}.sdctft_indices": torch.tensor([rows, columns], dtype=torch.int32),
    }


def delta(evaluate: Any, raw: dict[str, Any], tensors: dict[str, Tensor], base: Site) -> Tensor:
    check_adapter(raw, tensors, {PATH: base})
    method = method_for(raw)
    (part,) = method.compile(method.parse(raw), tensors, {PATH: base}).sites[PATH]
    assert isinstance(part, Spectral)
    return evaluate.spectra.spectral_delta(part)


def raw(**options: Any) -> dict[str, Any]:
    return {"peft_type": "SDCTFT", "transform": "dct2-ortho", "scale": 3.0, **options}


def inverse_dct(spectrum: Tensor) -> Tensor:
    """Along the last axis: x_p = X_0 / 2n + Σ X_k cos(π k (2p + 1) / 2n) / n, for X = 2 Σ x cos."""
    n = spectrum.shape[-1]
    basis = [[math.cos(math.pi * k * (2 * p + 1) / (2 * n)) / n for p in range(n)] for k in range(n)]
    matrix = torch.tensor(basis, dtype=torch.float64)
    matrix[0] = 1 / (2 * n)
    return spectrum @ matrix


def test_the_orthonormal_transform_undoes_a_dct_of_unit_rows(
    site: Callable[..., Site], evaluate: Any
) -> None:
    found = delta(evaluate, raw(), adapter(VALUES, ROWS, COLUMNS), site())
    # An orthonormal pair keeps lengths, and S has four places: 1, -2, 0.5 + 0.25, 4.
    assert float(found.square().sum()) == pytest.approx(9 * (1 + 4 + 0.5625 + 16), rel=1e-6)
    # A constant comes from (0, 0) alone, divided by √6 √5; and ΔW[p, q] from a literal sum at one corner.
    assert float(found.mean()) == pytest.approx(3.0 / math.sqrt(30), rel=1e-6)
    corner = sum(
        3.0 * a * math.cos(math.pi * u / 12) * math.cos(math.pi * v / 10)
        * math.sqrt((2 if u else 1) / 6) * math.sqrt((2 if v else 1) / 5)
        for a, u, v in zip(VALUES, ROWS, COLUMNS, strict=True)
    )  # fmt: skip
    assert float(found[0, 0]) == pytest.approx(corner, rel=1e-6)


def test_the_raw_transform_is_the_inverse_without_normalisation(
    site: Callable[..., Site], evaluate: Any
) -> None:
    spectrum = torch.zeros(6, 5, dtype=torch.float64)
    for a, u, v in zip(VALUES, ROWS, COLUMNS, strict=True):
        spectrum[u, v] += a
    expected = 3.0 * inverse_dct(inverse_dct(spectrum).T).T
    found = delta(evaluate, raw(transform="dct2-raw"), adapter(VALUES, ROWS, COLUMNS), site())
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-6)


def test_the_published_hartley_code_is_read(site: Callable[..., Site], evaluate: Any) -> None:
    """``y += x ΔW`` with ΔW = 49 / N² H S H: transposed, and H by complex exponentials."""
    n = 6
    turns = [[cmath.exp(2j * cmath.pi * u * p / n) for p in range(n)] for u in range(n)]
    hartley = torch.tensor([[z.real + z.imag for z in row] for row in turns], dtype=torch.float64)
    spectrum = torch.zeros(n, n, dtype=torch.float64)
    for a, u, v in zip(VALUES, ROWS, COLUMNS, strict=True):
        spectrum[u, v] += a
    stored_as_applied = 49 / n**2 * hartley @ spectrum @ hartley
    options = raw(transform="hartley", transpose=True, scale=49.0)
    found = delta(evaluate, options, adapter(VALUES, ROWS, COLUMNS), site(in_features=6))
    torch.testing.assert_close(found, stored_as_applied.T, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("transform", ["dct2-ortho", "dct2-raw", "hartley"])
def test_transposed_places_are_the_transposed_layers(
    transform: str, site: Callable[..., Site], evaluate: Any
) -> None:
    turned = delta(
        evaluate,
        raw(transform=transform, transpose=True),
        adapter(VALUES, COLUMNS, ROWS),
        site(),
    )
    plain = delta(evaluate, raw(transform=transform), adapter(VALUES, ROWS, COLUMNS), site())
    torch.testing.assert_close(turned, plain)


def test_places_outside_the_layer_are_refused(site: Callable[..., Site]) -> None:
    for row, column, message in (
        (6, 0, "found the row 6, expected 0 to 5"),
        (0, 5, "found the column 5, expected 0 to 4"),
        (-1, 0, "found the row -1, expected 0 to 5"),
    ):
        with pytest.raises(InvalidTensors, match=message):
            check_adapter(raw(), adapter([1.0], [row], [column]), {PATH: site()})
    turned = raw(transpose=True)
    with pytest.raises(InvalidTensors, match="found the column 5, expected 0 to 4"):
        check_adapter(turned, adapter([1.0], [5], [0]), {PATH: site()})
    check_adapter(turned, adapter([1.0], [0], [5]), {PATH: site()})


def test_places_that_only_one_adapter_has_count_as_its_own_with_what_is_kept_of_them(
    site: Callable[..., Site],
) -> None:
    method, tensors = method_for(raw()), adapter(VALUES, ROWS, COLUMNS)
    program: AdapterProgram = method.compile(method.parse(raw()), tensors, {PATH: site()})
    # A coefficient, its row and column; in the operator its column, source and factor, and of each of 8
    # coordinates its place, count and scale.
    assert program.prepared_bytes == 5 * (4 + 8 + 8) + 5 * (4 + 4 + 4) + 8 * (4 + 4 + 4)


@pytest.mark.parametrize(("key", "value"), [("transform", "dct"), ("transform", None), ("scale", "1")])
def test_a_value_out_of_bounds_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=key):
        method_for(raw()).parse(raw(**{key: value}))
