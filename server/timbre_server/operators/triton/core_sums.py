"""The cores between two half spectra on a GPU: what every adapter of a row's mix makes of it, added up.

A step in `half_spectra`'s way back, and a launch by itself (`core_sums`) where a library transforms the
rows. Every sum has one order. `summed` is checked under Triton's interpreter and on an H200; `core_sums` has
not run on a GPU yet.

Legend: U rows that use a transform, P (row, use) pairs, A uses, C coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_server.operators.triton.row_uses import RowUses

FREQUENCIES = tl.constexpr(256)
"""Of one row, that a program of `_core_sums` has."""


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
def summed(k, is_k, u, z, cores, COORDINATES: tl.constexpr):
    """What the cores of a row's pairs make at frequencies k. A frequency's real part has the entries before
    ``middle``, and its imaginary part those from there on."""
    re = tl.zeros(k.shape, tl.float32)
    im = tl.zeros(k.shape, tl.float32)
    for pair in range(tl.load(cores.uses.starts + u), tl.load(cores.uses.starts + u + 1)):
        use = tl.load(cores.uses.use_P + pair)
        ends = cores.row_ends + tl.load(cores.pattern_A + use) * (COORDINATES + 1) + 2 * k
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
    return re, im


@triton.jit
def _core_sums(z, z_stride, cores, h, COORDINATES: tl.constexpr):
    """``h[u] =`` the cores of row u applied to z[u]."""
    u = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    is_k = 2 * k < COORDINATES
    re, im = summed(k, is_k, u, z + u * z_stride, cores, COORDINATES)
    h += u * COORDINATES
    tl.store(h + 2 * k, re, is_k)
    tl.store(h + 2 * k + 1, im, is_k)


def core_sums(z_UC: Tensor, cores: Cores, coordinates: int) -> Tensor:
    """[U, coordinates]: what the cores make of spectra, of this or another length."""
    h_UC = torch.empty(len(z_UC), coordinates, device=z_UC.device)
    grid = (len(z_UC), triton.cdiv(coordinates // 2, FREQUENCIES.value))
    _core_sums[grid](z_UC, z_UC.stride(0), cores, h_UC, coordinates)
    return h_UC
