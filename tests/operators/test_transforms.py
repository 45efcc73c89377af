"""Fast transforms against their formulas, at lengths of every kind."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import Tensor

from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.operators.transforms import Entries, Transform, transform

NAMES = {
    "dft": (),
    "dct": (),
    "hartley": (),
    "dwt, two taps": LOW_PASS["db1"],
    "dwt, four taps": LOW_PASS["db2"],
    "dwt, twenty taps": LOW_PASS["sym10"],
}
LENGTHS = [1, 2, 3, 4, 5, 8, 9, 15, 16, 22, 27, 96]

each_transform = pytest.mark.parametrize("name", NAMES)
each_length = pytest.mark.parametrize("length", LENGTHS)


def made(name: str, length: int) -> Transform:
    return transform(name.split(",")[0], length, NAMES[name], torch.device("cpu"))


def placed(entries: Entries, size: int) -> Tensor:
    """[F, C]: a matrix with the entries of all frequencies; those of dft are real and imaginary parts."""
    weights = torch.ones_like(entries.factor_NE).to(torch.complex128)
    if weights.shape[1] == 2:
        weights[:, 1] = 1j
    found = torch.zeros(len(weights), size, dtype=torch.complex128)
    return found.scatter_add_(1, entries.index_NE, entries.factor_NE * weights)


@each_transform
@each_length
def test_reading_what_forward_leaves_gives_the_matrixs_product(name: str, length: int) -> None:
    t = made(name, length)
    x_UD = torch.randn(4, length, generator=torch.Generator().manual_seed(length))
    matrix_FD = t.matrix()
    z_UC = t.forward(x_UD)
    assert z_UC.shape == (4, t.coordinates)
    z_UF = z_UC.to(torch.complex128) @ placed(t.reads(torch.arange(len(matrix_FD))), t.coordinates).T
    expected = x_UD.to(torch.complex128) @ matrix_FD.to(torch.complex128).T
    torch.testing.assert_close(z_UF, expected, atol=1e-5, rtol=1e-5)


@each_transform
@each_length
def test_what_is_written_comes_back_as_rows_of_the_matrix(name: str, length: int) -> None:
    t = made(name, length)
    matrix_FD = t.matrix()
    index_NE, factor_NE = t.writes(torch.arange(len(matrix_FD)))
    # Coefficient 1 in the real part; for dft also i in the imaginary part, whose real result is -Im.
    h_FC = torch.zeros(len(matrix_FD), t.coordinates).scatter_add_(
        1, index_NE[:, :1], factor_NE[:, :1].float()
    )
    torch.testing.assert_close(t.back(h_FC).double(), matrix_FD.real, atol=1e-5, rtol=0)
    if index_NE.shape[1] == 2:
        h_FC = torch.zeros_like(h_FC).scatter_add_(1, index_NE[:, 1:], factor_NE[:, 1:].float())
        torch.testing.assert_close(t.back(h_FC).double(), -matrix_FD.imag, atol=1e-5, rtol=0)


FORMULAS = {
    "dft": lambda n, v, p: cmath.exp(2j * cmath.pi * v * p / n) / n,
    "dct": lambda n, v, p: math.sqrt((2 if v else 1) / n) * math.cos(math.pi * v * (2 * p + 1) / (2 * n)),
    "hartley": lambda n, v, p: (
        (math.cos(2 * math.pi * v * p / n) + math.sin(2 * math.pi * v * p / n)) / math.sqrt(n)
    ),
}


@pytest.mark.parametrize("length", [1, 2, 5, 8])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_matrix_is_its_formula(name: str, length: int) -> None:
    expected = [[FORMULAS[name](length, v, p) for p in range(length)] for v in range(length)]
    matrix_FD = made(name, length).matrix()
    torch.testing.assert_close(matrix_FD, torch.tensor(expected, dtype=matrix_FD.dtype))


def test_one_level_of_the_haar_wavelet_is_sums_and_differences() -> None:
    s = 1 / math.sqrt(2)
    expected = [[s, s, 0], [0, 0, s], [s, -s, 0], [0, 0, s]]
    matrix_FD = made("dwt, two taps", 3).matrix()
    torch.testing.assert_close(matrix_FD, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dct", "hartley"])
def test_a_long_transform_stays_orthonormal_and_exact(name: str) -> None:
    t = made(name, 1023)
    matrix_FD = t.matrix()
    rows = matrix_FD[[0, 1, 511, 512, 1022]]
    torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64), atol=1e-12, rtol=0)
    x_UD = torch.randn(2, 1023, generator=torch.Generator().manual_seed(1))
    index_NE, factor_NE = t.reads(torch.arange(1023))
    z_UF = t.forward(x_UD).double()[:, index_NE[:, 0]] * factor_NE[:, 0]
    torch.testing.assert_close(z_UF, x_UD.double() @ matrix_FD.T, atol=3e-6, rtol=0)
