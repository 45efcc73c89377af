"""The cores between two half spectra on a GPU: what every adapter of a row's mix makes of it, added up.

A program has some frequencies of one row, whatever the number of rows and whosever places they are. What it
writes is in phase again and a real row's spectrum, so that an inverse transform is all that is left to do.
Every sum has one order. The sums are checked under Triton's interpreter and on an H200.

Legend: U rows that use a transform, P (row, use) pairs, A uses, C coordinates, K = C/2 frequencies, n the
length of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_server.operators.transforms import HalfSpectrum
from timbre_server.operators.triton.row_uses import RowUses

FREQUENCIES = tl.constexpr(256)
"""Of one row, that a program has."""


class Cores(NamedTuple):
    """What the uses of rows do to spectra. Patterns are CSR matrices one after the other: coordinate i of
    pattern m has entries ``row_ends[m, i]`` to ``row_ends[m, i + 1]``, each c[source] · factor at a column. A
    use has a pattern, and the address of its own c."""

    uses: RowUses
    pattern_A: Tensor
    c_A: Tensor
    row_ends: Tensor
    columns: Tensor
    source: Tensor
    factor: Tensor


@triton.jit
def _core_sums(z, z_stride, cores, phase, scale, h, C: tl.constexpr, IS_EVEN: tl.constexpr):
    """``h[u] = scale · phase ·`` the cores of row u applied to z[u]. A frequency's real part has the entries
    before ``middle``, and its imaginary part those from there on."""
    u = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    is_k = 2 * k < C
    z += u * z_stride
    re = tl.zeros((FREQUENCIES,), tl.float32)
    im = tl.zeros((FREQUENCIES,), tl.float32)
    for pair in range(tl.load(cores.uses.starts + u), tl.load(cores.uses.starts + u + 1)):
        use = tl.load(cores.uses.use_P + pair)
        ends = cores.row_ends + tl.load(cores.pattern_A + use) * (C + 1) + 2 * k
        start = tl.load(ends, is_k, 0)
        middle = tl.load(ends + 1, is_k, 0)
        end = tl.load(ends + 2, is_k, 0)
        c = tl.load(cores.c_A + use).to(tl.pointer_type(tl.float32))
        weight = tl.load(cores.uses.weights_P + pair)
        for step in range(0, tl.max(end - start)):
            at = start + step
            is_one = at < end
            value = tl.load(z + tl.load(cores.columns + at, is_one, 0), is_one, 0.0)
            value *= tl.load(c + tl.load(cores.source + at, is_one, 0), is_one, 0.0)
            value *= weight * tl.load(cores.factor + at, is_one, 0.0)
            re += tl.where(at < middle, value, 0.0)
            im += tl.where(at < middle, 0.0, value)
    if phase is not None:
        w_re = tl.load(phase + 2 * k, is_k, 0.0)
        w_im = tl.load(phase + 2 * k + 1, is_k, 0.0)
        re, im = re * w_re - im * w_im, re * w_im + im * w_re
    is_real = k == 0
    if IS_EVEN:
        is_real = is_real | (2 * k + 2 == C)
    h += u * C
    tl.store(h + 2 * k, re * scale, is_k)
    tl.store(h + 2 * k + 1, tl.where(is_real, 0.0, im * scale), is_k)


class CoreSums:
    """The launch for one transform of one length."""

    def __init__(self, transform: HalfSpectrum) -> None:
        self._transform = transform
        phase_K = transform.phase_K
        self._phase = None if phase_K is None else torch.view_as_real(phase_K.conj().resolve_conj())
        if self._phase is not None:
            self._phase = self._phase.expand(transform.coordinates // 2, 2).contiguous()

    def changes(self, z_UC: Tensor, cores: Cores) -> Tensor:
        """[U, n]: as `Transform.back` of what the cores make of spectra, of this or another length."""
        n, coordinates = self._transform.length, self._transform.coordinates
        h_UC = torch.empty(len(z_UC), coordinates, device=z_UC.device)
        grid = (len(z_UC), triton.cdiv(coordinates // 2, FREQUENCIES.value))
        _core_sums[grid](
            z_UC, z_UC.stride(0), cores, self._phase, 1 / n, h_UC, coordinates, IS_EVEN=n % 2 == 0
        )
        return self._transform.inverse(torch.view_as_complex(h_UC.view(len(z_UC), -1, 2)), norm="forward")
