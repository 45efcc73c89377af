"""The transforms of `Spectral`, fast: ``z = T x`` and ``y = Re(Tᵀ h)`` for the rows of a batch.

A transform gives spectra in *coordinates* of its own, as many reals as its fast algorithm yields. A
frequency is one or two of them with a factor, so that a core is a real sparse matrix between coordinates. To
add a transform, add one class here, a name to `Places`, and its formula to `Spectral`.

Real rows have half a spectrum, ``X = rfft(x)``, whose real and imaginary parts are coordinates 2k and 2k + 1.
`dft` uses them as they are; a coefficient at (u, v) acts on real input as its mirror image at (-u, -v) with
the conjugate input, so each one is folded to k ≤ n/2. The others turn X by a phase w, after which one
coordinate is one frequency::

    hartley   w_k = 1 + i               Re(w X)_k = H_k,   Im(w X)_k =  H_{n-k}
    dct       w_k = exp(-πi k / 2n)     Re(w X)_k ∝ C_k,   Im(w X)_k ∝ -C_{n-k}     X of the even places of x
                                                                                    and the odd ones backwards

(Makhoul, "A fast cosine transform in one and two dimensions", 1980). `dwt` is a banded product both ways.

Legend: U rows, D features (n of them), F frequencies, C coordinates, K = n/2 + 1, N places, E coordinates of
one place, L taps of a filter, V of S numbers of a row in one product, which gives W.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

WINDOWS = 16
"""Windows of a wavelet's input that one product takes together: few are thin products, many mostly zeros."""


class Entries(NamedTuple):
    """Where frequencies are among the coordinates: ``index_NE`` int64, with ``factor_NE`` float64."""

    index_NE: Tensor
    factor_NE: Tensor


class Transform(ABC):
    """T for rows of one length on one device."""

    coordinates: int
    frequencies: int

    @abstractmethod
    def matrix(self) -> Tensor:
        """The definition: T [F, D], float64 or complex128, on the CPU."""

    @abstractmethod
    def forward(self, x_UD: Tensor) -> Tensor:
        """[U, C]: the spectra of rows."""

    @abstractmethod
    def back(self, h_UC: Tensor) -> Tensor:
        """[U, D]: rows from what cores wrote."""

    @abstractmethod
    def reads(self, v_N: Tensor) -> Entries:
        """Where ``forward`` leaves frequencies: ``(T x)[v] = Σ_e factor · z[index]``; for `dft` the real and
        the imaginary part, one entry each."""

    @abstractmethod
    def writes(self, u_N: Tensor) -> Entries:
        """Where a core writes: row u of T, times c, is ``back`` of c · factor at index."""


def transform(name: str, length: int, low_pass: tuple[float, ...], device: torch.device) -> Transform:
    """T_n by its name in `Places`."""
    return _BY_NAME[name](length, low_pass, device)


class HalfSpectrum(Transform):
    """By ``rfft`` of real rows, turned by ``phase_K`` where there is one."""

    place_D: Tensor | None = None
    """Where each number of a row is, of rows that are transformed in another order."""

    def __init__(self, length: int, phase_K: Tensor | None, device: torch.device) -> None:
        self.length = self.frequencies = length
        self.phase_K = None if phase_K is None else phase_K.to(device, torch.complex64)
        self.coordinates = 2 * (length // 2 + 1)

    def forward(self, x_UD: Tensor) -> Tensor:
        z_UK = torch.fft.rfft(x_UD)
        if self.phase_K is not None:
            z_UK = z_UK * self.phase_K
        return torch.view_as_real(z_UK).flatten(1)

    def back(self, h_UC: Tensor) -> Tensor:
        h_UK = torch.view_as_complex(h_UC.view(-1, self.coordinates // 2, 2))
        if self.phase_K is not None:
            h_UK = h_UK * self.phase_K.conj()
        if h_UK.is_cuda:  # cuFFT reads imaginary parts where a real row's spectrum has none.
            h_UK = h_UK.clone()
            h_UK.imag[:, :: self.length // 2 if self.length % 2 == 0 else self.length] = 0
        return self.inverse(h_UK)

    def inverse(self, h_UK: Tensor, norm: str = "backward") -> Tensor:
        """[U, D]: real rows from their spectra, in phase; n times them with the ``norm`` "forward"."""
        y_UD: Tensor = torch.fft.irfft(h_UK, n=self.length, norm=norm)
        return y_UD if self.place_D is None else y_UD.index_select(1, self.place_D)

    def _folded(self, frequency_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, whether it is the mirror image's, and what the inverse transform counts it: half, if twice."""
        n = self.length
        is_mirrored_N = frequency_N > n // 2
        k_N = torch.where(is_mirrored_N, n - frequency_N, frequency_N)
        share_N = torch.where((k_N == 0) | (2 * k_N == n), 1.0, 0.5).double()
        return k_N, is_mirrored_N, share_N


class _Dft(HalfSpectrum):
    def __init__(self, length: int, low_pass: tuple[float, ...], device: torch.device) -> None:
        super().__init__(length, None, device)

    def matrix(self) -> Tensor:
        angle_FD = _angles(self.length)
        return torch.polar(torch.ones_like(angle_FD), angle_FD) / self.length

    def reads(self, v_N: Tensor) -> Entries:
        # (T x)[v] is conj(X_v) / n, and for the upper half X_{n-v} / n.
        k_N, is_mirrored_N, _ = self._folded(v_N)
        return _both_parts(k_N, torch.full_like(v_N, 1 / self.length, dtype=torch.float64), ~is_mirrored_N)

    def writes(self, u_N: Tensor) -> Entries:
        k_N, is_mirrored_N, share_N = self._folded(u_N)
        return _both_parts(k_N, share_N, is_mirrored_N)


def _both_parts(k_N: Tensor, factor_N: Tensor, is_conjugate_N: Tensor) -> Entries:
    factor_NE = torch.stack([factor_N, torch.where(is_conjugate_N, -factor_N, factor_N)], 1)
    return Entries(torch.stack([2 * k_N, 2 * k_N + 1], 1), factor_NE)


class _Hartley(HalfSpectrum):
    def __init__(self, length: int, low_pass: tuple[float, ...], device: torch.device) -> None:
        super().__init__(length, torch.tensor(1 + 1j), device)

    def matrix(self) -> Tensor:
        angle_FD = _angles(self.length)
        return (angle_FD.cos() + angle_FD.sin()) / math.sqrt(self.length)

    def reads(self, v_N: Tensor) -> Entries:
        k_N, is_mirrored_N, share_N = self._folded(v_N)
        factor_N = torch.full_like(share_N, 1 / math.sqrt(self.length))
        return _one_part(k_N, is_mirrored_N, factor_N)

    def writes(self, u_N: Tensor) -> Entries:
        k_N, is_mirrored_N, share_N = self._folded(u_N)
        return _one_part(k_N, is_mirrored_N, share_N * math.sqrt(self.length))


class _Dct(HalfSpectrum):
    def __init__(self, length: int, low_pass: tuple[float, ...], device: torch.device) -> None:
        angle_K = -torch.arange(length // 2 + 1, dtype=torch.float64) * (math.pi / (2 * length))
        super().__init__(length, torch.polar(torch.ones_like(angle_K), angle_K), device)
        even, odd = torch.arange(0, length, 2), torch.arange(1, length, 2)
        order_D = torch.cat([even, odd.flip(0)])
        self._order_D = order_D.to(device)
        self.place_D = order_D.argsort().to(device)

    def matrix(self) -> Tensor:
        n = self.length
        steps = torch.arange(n)
        angle_FD = (torch.outer(steps, 2 * steps + 1) % (4 * n)).double() * (math.pi / (2 * n))
        matrix_FD = angle_FD.cos() * math.sqrt(2 / n)
        matrix_FD[0] = 1 / math.sqrt(n)
        return matrix_FD

    def forward(self, x_UD: Tensor) -> Tensor:
        return super().forward(x_UD.index_select(1, self._order_D))

    def reads(self, v_N: Tensor) -> Entries:
        k_N, is_mirrored_N, _ = self._folded(v_N)
        factor_N = torch.where(v_N == 0, 1.0, math.sqrt(2)).double() / math.sqrt(self.length)
        return _one_part(k_N, is_mirrored_N, torch.where(is_mirrored_N, -factor_N, factor_N))

    def writes(self, u_N: Tensor) -> Entries:
        k_N, is_mirrored_N, share_N = self._folded(u_N)
        factor_N = share_N * torch.where(u_N == 0, 1.0, math.sqrt(2)) * math.sqrt(self.length)
        return _one_part(k_N, is_mirrored_N, torch.where(is_mirrored_N, -factor_N, factor_N))


def _one_part(k_N: Tensor, is_imaginary_N: Tensor, factor_N: Tensor) -> Entries:
    return Entries((2 * k_N + is_imaginary_N).unsqueeze(1), factor_N.unsqueeze(1))


class Wavelets(Transform):
    """Coordinates 2k and 2k + 1 are the low and the high frequency k. Both ways, then, a window of L numbers
    gives two and the next one begins two further on: windows of x give frequencies, windows of frequencies
    the places that all of them reach. One product takes `WINDOWS` of them; zeros fill the last one up."""

    def __init__(self, length: int, low_pass: tuple[float, ...], device: torch.device) -> None:
        self._length = length
        self._taps = taps = len(low_pass)
        self._half = (length + taps - 1) // 2
        self.frequencies = 2 * self._half
        low_L = torch.tensor(low_pass, dtype=torch.float64)
        high_L = low_L.flip(0)
        high_L[1::2] *= -1
        self.forward_L2 = torch.stack([low_L, high_L], dim=1)
        # Frequency k reaches place 2k + j by tap j: later ones in a window by earlier pairs of taps.
        self.back_L2 = self.forward_L2.view(-1, 2, 2).flip(0).transpose(1, 2).flatten(0, 1)
        self._forward_VW, self._back_VW = (
            _windows_at_once(filters_L2).to(device, torch.float32)
            for filters_L2 in (self.forward_L2, self.back_L2)
        )
        places = WINDOWS * math.ceil(length / (2 * WINDOWS))
        self.coordinates = 2 * WINDOWS * math.ceil((places + taps // 2 - 1) / WINDOWS)
        self._margins = (taps - 2, self.coordinates - length)

    def matrix(self) -> Tensor:
        margin = self._taps - 2
        matrix = torch.zeros(2, self._half, self._length + 2 * margin + 2, dtype=torch.float64)
        for v in range(self._half):
            matrix[:, v, 2 * v : 2 * v + self._taps] = self.forward_L2.T
        return matrix[:, :, margin : margin + self._length].flatten(0, 1)

    def forward(self, x_UD: Tensor) -> Tensor:
        return self._product(pad(x_UD, self._margins), self._forward_VW)

    def back(self, h_UC: Tensor) -> Tensor:
        return self._product(h_UC, self._back_VW)[:, : self._length]

    def _product(self, row_US: Tensor, windows_VW: Tensor) -> Tensor:
        return (row_US.unfold(1, len(windows_VW), 2 * WINDOWS) @ windows_VW).flatten(1)

    def reads(self, v_N: Tensor) -> Entries:
        index_N = torch.where(v_N < self._half, 2 * v_N, 2 * (v_N - self._half) + 1)
        return Entries(index_N.unsqueeze(1), torch.ones(len(v_N), 1, dtype=torch.float64))

    def writes(self, u_N: Tensor) -> Entries:
        return self.reads(u_N)


def _windows_at_once(filters_L2: Tensor) -> Tensor:
    """[2 WINDOWS + L - 2, 2 WINDOWS]: the filters of a window, each time two numbers further on."""
    taps = len(filters_L2)
    product = filters_L2.new_zeros(2 * WINDOWS + taps - 2, WINDOWS, 2)
    for window in range(WINDOWS):
        product[2 * window : 2 * window + taps, window] = filters_L2
    return product.flatten(1)


def _angles(length: int) -> Tensor:
    """2π v p / n [n, n]. Whole turns go first, among integers: a large angle would lose them to rounding."""
    steps = torch.arange(length)
    return (torch.outer(steps, steps) % length).double() * (2 * math.pi / length)


_BY_NAME: MappingProxyType[str, Callable[[int, tuple[float, ...], torch.device], Transform]] = (
    MappingProxyType({"dft": _Dft, "dct": _Dct, "hartley": _Hartley, "dwt": Wavelets})
)
