"""The matrices of spectral parts in double precision, from the formulas that `timbre_methods.program` gives.

Shares nothing with the operators.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from timbre_methods.program import Circulant, Spectral


def spectral_delta(part: Spectral) -> Tensor:
    """``Re(T_Oᵀ S T_I)`` in float64."""
    places = part.places
    inner, outer = (
        transform_matrix(places.transform, length, places.low_pass).to(torch.complex128)
        for length in (places.in_features, places.out_features)
    )
    core = torch.zeros(len(outer), len(inner), dtype=torch.complex128)
    core.index_put_((places.rows_N, places.columns_N), part.c_N.to(core.dtype), accumulate=True)
    return (outer.T @ core @ inner).real


def circulant_delta(part: Circulant) -> Tensor:
    """[O, I] in float64: block (m, n) has entry (i, j) from place i - j of the inverse transform."""
    b = part.block_size
    taps_MNb = torch.fft.irfft(torch.view_as_complex(part.spectrum_MNK2.double()), n=b)
    turned = [taps_MNb.roll(j, dims=2) for j in range(b)]
    return torch.stack(turned, dim=3).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


@lru_cache(maxsize=64)
def transform_matrix(name: str, n: int, low_pass: tuple[float, ...] = ()) -> Tensor:
    """T [F, n] in double precision, from its formula. Arguments are reduced as integers first."""
    v, p = torch.arange(n).unsqueeze(1), torch.arange(n)
    turns = (v * p % n).double() / n
    if name == "dft":
        return torch.exp(2j * math.pi * turns) / n
    if name == "hartley":
        return ((2 * math.pi * turns).cos() + (2 * math.pi * turns).sin()) / math.sqrt(n)
    if name == "dct":
        matrix = (math.pi / (2 * n) * (v * (2 * p + 1) % (4 * n)).double()).cos() * math.sqrt(2 / n)
        matrix[0] /= math.sqrt(2)
        return matrix
    assert name == "dwt"
    length = len(low_pass)
    high_pass = [(-1) ** j * low_pass[length - 1 - j] for j in range(length)]
    half = (n + length - 1) // 2
    matrix = torch.zeros(2 * half, n, dtype=torch.float64)
    for first, taps in ((0, low_pass), (half, high_pass)):
        for k in range(half):
            for j, tap in enumerate(taps):
                if 0 <= j + 2 * k - length + 2 < n:
                    matrix[first + k, j + 2 * k - length + 2] = tap
    return matrix
