"""The half spectra of `transforms` on a GPU: rows there in one launch, and back in one with cores between.

A row of length n = n1 n2 is a matrix, x[p1, p2] = x[p1 n2 + p2], and so is its spectrum, k = k1 + n1 k2; with
e(t) = exp(-2πi t) the transform of length n is two small ones and a twist (Cooley and Tukey, 1965), each a
matrix product, and nothing of it leaves the chip::

    X[k1, k2] = Σ_p2 ( e(k1 p2 / n) · Σ_p1 e(k1 p1 / n1) x[p1, p2] ) e(k2 p2 / n2)

4096 is 64 x 64, 3072 is 48 x 64, 11008 is 86 x 128; tiles are padded to powers of two. Only k < n/2 is
computed so, and the last frequency of an even length, an alternating sum, apart. Cores gather from anywhere,
so spectra pass through memory once; then a program holds the summed cores of one row, of every adapter of its
mix, and transforms them back. Every sum has one order.

Tiles: a program of `_spectra` has `TILE` of the k1 of one row. One of `_changes` has a row's whole spectrum
and every so many tiles of p2. All in float32.

That is n (n1 + n2) of work for each row, and right where rows are few and short. On an H200 two outputs of
14336 took 0.75 ms so, one of 4096 0.05 ms, and a prompt of 2048 rows four times as long as in PyTorch. So
long rows, many rows, and lengths without two small factors are cuFFT's, and only their cores are a kernel.

Checked under Triton's interpreter and on an H200, but for the ways by cuFFT, which have not run on a GPU yet.

Legend: T rows, U rows that use a transform, A uses, C coordinates, D features, K = n/2 + 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_server.operators.transforms import HalfSpectrum
from timbre_server.operators.triton.core_sums import Cores, core_sums, summed

TILE = tl.constexpr(16)
"""Of a factor, in the dimension that programs share out: the least that a matrix product takes."""

STEP = tl.constexpr(16)
"""Of a factor, in the dimension that a program walks along."""

MAX_FACTOR = 128
"""A tile of two larger factors would not fit in a program's registers."""

PROGRAMS = 128
"""About as many as a GPU has processors: with fewer rows, several programs share one row's way back."""

LONGEST = 4096
"""Of the rows that are transformed by products; there may be `PROGRAMS` of them."""


class Tables(NamedTuple):
    """One length's cosines and sines, float32 [2, ...]: ``turns1`` of k1 p1, ``twists`` of k1 p2, ``turns2``
    of p2 k2. ``phase`` [K, 2] is what a frequency is multiplied by on the way; ``order`` [D], or None, the
    feature at each place p."""

    turns1: Tensor
    twists: Tensor
    turns2: Tensor
    phase: Tensor
    order: Tensor | None


@triton.jit
def _table(table, i, j, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of cosines and one of sines."""
    at = i * COLUMNS + j
    is_in = (i < ROWS) & (j < COLUMNS)
    return tl.load(table + at, is_in, 0.0), tl.load(table + ROWS * COLUMNS + at, is_in, 0.0)


@triton.jit
def _phased(re, im, phase, k, is_k):
    w_re = tl.load(phase + 2 * k, is_k, 0.0)
    w_im = tl.load(phase + 2 * k + 1, is_k, 0.0)
    return re * w_re - im * w_im, re * w_im + im * w_re


@triton.jit
def _spectra(x, rows, x_stride, tables, z, N1: tl.constexpr, N2: tl.constexpr):
    """``z[u] = phase · rfft(x[rows[u], order])``."""
    N: tl.constexpr = N1 * N2
    HALF: tl.constexpr = (N + 1) // 2
    M2: tl.constexpr = (HALF + N1 - 1) // N1
    P2: tl.constexpr = triton.next_power_of_2(max(N2, 16))
    u = tl.program_id(0).to(tl.int64)
    row = u if rows is None else tl.load(rows + u)
    k1 = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    p2 = tl.arange(0, P2)
    re = tl.zeros((TILE, P2), tl.float32)
    im = tl.zeros((TILE, P2), tl.float32)
    last = tl.zeros((P2,), tl.float32)
    for first in range(0, N1, STEP):
        p1 = first + tl.arange(0, STEP)
        p = p1[:, None] * N2 + p2[None, :]
        is_in = (p1[:, None] < N1) & (p2[None, :] < N2)
        place = p if tables.order is None else tl.load(tables.order + p, is_in, 0)
        values = tl.load(x + row * x_stride + place, is_in, 0.0).to(tl.float32)
        cos1, sin1 = _table(tables.turns1, k1, p1[None, :], N1, N1)
        re = tl.dot(cos1, values, re, input_precision="ieee")
        im = tl.dot(sin1, -values, im, input_precision="ieee")
        last += tl.sum(tl.where(p % 2 == 0, values, -values), 0)
    cos, sin = _table(tables.twists, k1, p2[None, :], N1, N2)
    a = re * cos + im * sin
    b = im * cos - re * sin
    z += u * (2 * (N // 2 + 1))
    for first in range(0, M2, STEP):
        k2 = (first + tl.arange(0, STEP))[None, :]
        cos2, sin2 = _table(tables.turns2, p2[:, None], k2, N2, M2)
        z_re = tl.dot(a, cos2, input_precision="ieee")
        z_re = tl.dot(b, sin2, z_re, input_precision="ieee")
        z_im = tl.dot(b, cos2, input_precision="ieee")
        z_im = tl.dot(-a, sin2, z_im, input_precision="ieee")
        k = k1 + N1 * k2
        is_k = (k1 < N1) & (k < HALF)
        w_re, w_im = _phased(z_re, z_im, tables.phase, k, is_k)
        tl.store(z + 2 * k, w_re, is_k)
        tl.store(z + 2 * k + 1, w_im, is_k)
    if N % 2 == 0:
        is_first = tl.program_id(1) == 0
        last_re, last_im = _phased(tl.sum(last, 0), 0.0, tables.phase, N // 2, is_first)
        tl.store(z + N, last_re, is_first)
        tl.store(z + N + 1, last_im, is_first)


@triton.jit
def _changes(z, z_stride, cores, tables, y, N1: tl.constexpr, N2: tl.constexpr):
    """``y[u, order] = irfft(phase · cores of row u applied to z[u])``."""
    N: tl.constexpr = N1 * N2
    HALF: tl.constexpr = (N + 1) // 2
    M2: tl.constexpr = (HALF + N1 - 1) // N1
    C: tl.constexpr = 2 * (N // 2 + 1)
    P1: tl.constexpr = triton.next_power_of_2(max(N1, 16))
    PM: tl.constexpr = triton.next_power_of_2(max(M2, 16))
    u = tl.program_id(0).to(tl.int64)
    z += u * z_stride
    y += u * N
    k1 = tl.arange(0, P1)
    k2 = tl.arange(0, PM)
    k = k1[:, None] + N1 * k2[None, :]
    is_k = (k1[:, None] < N1) & (k < HALF)
    h_re, h_im = summed(k, is_k, u, z, cores, C)
    h_re, h_im = _phased(h_re, h_im, tables.phase, k, is_k)
    alternating = 0.0
    if N % 2 == 0:
        middle = N // 2 + tl.arange(0, 1)
        last, last_im = summed(middle, middle == N // 2, u, z, cores, C)
        last, _ = _phased(last, last_im, tables.phase, middle, middle == N // 2)
        alternating = tl.sum(last, 0)
    for own in range(tl.program_id(1) * TILE, N2, tl.num_programs(1) * TILE):
        p2 = (own + tl.arange(0, TILE))[None, :]
        cos2, sin2 = _table(tables.turns2, p2, k2[:, None], N2, M2)
        re = tl.dot(h_re, cos2, input_precision="ieee")
        re = tl.dot(-h_im, sin2, re, input_precision="ieee")
        im = tl.dot(h_re, sin2, input_precision="ieee")
        im = tl.dot(h_im, cos2, im, input_precision="ieee")
        cos, sin = _table(tables.twists, k1[:, None], p2, N1, N2)
        a = re * cos - im * sin
        b = re * sin + im * cos
        for first in range(0, N1, STEP):
            p1 = (first + tl.arange(0, STEP))[:, None]
            cos1, sin1 = _table(tables.turns1, p1, k1[None, :], N1, N1)
            values = tl.dot(cos1, a, input_precision="ieee")
            values = tl.dot(-sin1, b, values, input_precision="ieee")
            p = p1 * N2 + p2
            is_in = (p1 < N1) & (p2 < N2)
            place = p if tables.order is None else tl.load(tables.order + p, is_in, 0)
            tl.store(y + place, values + tl.where(p % 2 == 0, alternating, -alternating), is_in)


class HalfSpectraKernels:
    """The launches for one transform of one length."""

    def __init__(self, transform: HalfSpectrum, device: torch.device) -> None:
        self._transform = transform
        self._products = None if transform.length > LONGEST else _Products.of(transform, device)

    def spectra(self, x_TD: Tensor, rows_U: Tensor | None) -> Tensor:
        """[U, C]: as `Transform.forward` of those rows."""
        num_rows = len(x_TD) if rows_U is None else len(rows_U)
        if self._products is None or num_rows > PROGRAMS:
            return self._transform.forward(x_TD if rows_U is None else x_TD[rows_U])
        z_UC = torch.empty(num_rows, self._transform.coordinates, device=x_TD.device)
        self._products.there(x_TD.contiguous(), rows_U, z_UC)
        return z_UC

    def changes(self, z_UC: Tensor, cores: Cores) -> Tensor:
        """[U, D]: as `Transform.back` of what the cores make of spectra, of this or another length."""
        if self._products is None or len(z_UC) > PROGRAMS:
            return self._transform.back(core_sums(z_UC, cores, self._transform.coordinates))
        y_UD = torch.empty(len(z_UC), self._transform.length, device=z_UC.device)
        self._products.back(z_UC, cores, y_UD)
        return y_UD


class _Products:
    """A length's two factors, and what its rows are multiplied by."""

    def __init__(self, factors: tuple[int, int], tables_there: Tables, tables_back: Tables) -> None:
        self._factors, self._there, self._back = factors, tables_there, tables_back

    @staticmethod
    def of(transform: HalfSpectrum, device: torch.device) -> _Products | None:
        """None for a length without two small factors."""
        n, factors = transform.length, factors_of(transform.length)
        if factors is None:
            return None
        n1, n2 = factors
        m2 = math.ceil(((n + 1) // 2) / n1)
        turns = [_turns(n1, n1, n1), _turns(n1, n2, n), _turns(n2, m2, n2)]
        turns1, twists, turns2 = (table.to(device, torch.float32) for table in turns)
        phase_K = transform.phase_K
        if phase_K is None:
            phase_K = torch.ones(n // 2 + 1, dtype=torch.complex64, device=device)
        order = None if transform.order_D is None else transform.order_D.to(torch.int32)
        # irfft divides by n, and counts twice what has a mirror image.
        share_K = torch.full((n // 2 + 1,), 2 / n, device=device)
        share_K[0] = 1 / n
        if n % 2 == 0:
            share_K[-1] = 1 / n
        there, back = (
            torch.view_as_real(w_K.expand(n // 2 + 1).resolve_conj()).contiguous()
            for w_K in (phase_K, phase_K.conj() * share_K)
        )
        return _Products(
            factors,
            Tables(turns1, twists, turns2, there, order),
            Tables(turns1, twists, turns2, back, order),
        )

    def there(self, x_TD: Tensor, rows_U: Tensor | None, z_UC: Tensor) -> None:
        n1, n2 = self._factors
        grid = (len(z_UC), triton.cdiv(n1, TILE.value))
        _spectra[grid](x_TD, rows_U, x_TD.stride(0), self._there, z_UC, n1, n2, num_warps=8)

    def back(self, z_UC: Tensor, cores: Cores, y_UD: Tensor) -> None:
        n1, n2 = self._factors
        splits = max(1, min(PROGRAMS // len(z_UC), triton.cdiv(n2, TILE.value)))
        grid, warps = (len(z_UC), splits), 8 if max(n1, n2) <= 64 else 16
        _changes[grid](z_UC, z_UC.stride(0), cores, self._back, y_UD, n1, n2, num_warps=warps)


def factors_of(length: int) -> tuple[int, int] | None:
    """The two factors of the least work, both up to `MAX_FACTOR`; the second even where the length is."""
    found = [
        (n1, length // n1)
        for n1 in range(1, length + 1)
        if length % n1 == 0 and (length % 2 or length // n1 % 2 == 0) and max(n1, length // n1) <= MAX_FACTOR
    ]
    return min(found, key=_work, default=None)


def _work(factors: tuple[int, int]) -> int:
    n1, n2 = (triton.next_power_of_2(max(factor, 16)) for factor in factors)
    return int(n1 * n2 * (n1 + n2))


def _turns(rows: int, columns: int, period: int) -> Tensor:
    """cos and sin of 2π i j / period, [2, rows, columns], exact before they are rounded once."""
    angle = (torch.outer(torch.arange(rows), torch.arange(columns)) % period).double() * (
        2 * math.pi / period
    )
    return torch.stack([angle.cos(), angle.sin()])
