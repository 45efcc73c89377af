"""Rotary positions, and activations with the product that gated MLPs take of them: one launch of Triton each.

    q ← q ∘ cos + (-q₂, q₁) ∘ sin, and k likewise;    y = x σ(slope x + bend x³) ∘ factor

A program turns a few heads of q or of k in one row, or makes `WIDTH` numbers of y. The arithmetic is float32
whatever the type, and rounds once. Checked under Triton's interpreter and compiled for an A100. Not run on a
GPU yet.

Legend: T rows, H query heads, G KV heads, D key dim, N numbers.
"""

from __future__ import annotations

from subprocess import SubprocessError

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from timbre_server.engine.layer_kernels import Curve, LayerKernels

HEADS = 8
WIDTH = 1024


def in_triton(device: torch.device) -> LayerKernels:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    failures = (TritonError, RuntimeError, OSError, ValueError, SubprocessError)
    return LayerKernels(device, dtypes, rotate, activate, failures)


@triton.jit
def _turn(x, cos, sin, first, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    HALF: tl.constexpr = D // 2
    PHALF: tl.constexpr = triton.next_power_of_2(HALF)
    t, h, d = tl.program_id(0).to(tl.int64), first + tl.arange(0, HEADS), tl.arange(0, PHALF)
    is_d = d < HALF
    is_hd = (h < H)[:, None] & is_d[None, :]
    lower = x + (t * H + h[:, None]) * D + d[None, :]
    a_HD = tl.load(lower, mask=is_hd, other=0.0).to(tl.float32)
    b_HD = tl.load(lower + HALF, mask=is_hd, other=0.0).to(tl.float32)
    at = t * D + d
    cos_D, sin_D = _row(cos + at, is_d), _row(sin + at, is_d)
    tl.store(lower, (a_HD * cos_D - b_HD * sin_D).to(x.dtype.element_ty), mask=is_hd)
    cos_D, sin_D = _row(cos + at + HALF, is_d), _row(sin + at + HALF, is_d)
    tl.store(lower + HALF, (b_HD * cos_D + a_HD * sin_D).to(x.dtype.element_ty), mask=is_hd)


@triton.jit
def _row(at, is_d):
    return tl.load(at, mask=is_d, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _rotate(q, k, cos, sin, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr):
    first = tl.program_id(1) * HEADS
    OF_Q: tl.constexpr = (H + HEADS - 1) // HEADS * HEADS
    if first < OF_Q:
        _turn(q, cos, sin, first, H, D, HEADS)
    else:
        _turn(k, cos, sin, first - OF_Q, G, D, HEADS)


@triton.jit
def _activate(x, factor, slope, bend, y, count, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    is_n = n < count
    x_N = tl.load(x + n, mask=is_n, other=0.0).to(tl.float32)
    at_N = x_N * (x_N * bend * x_N + slope)
    below_N = tl.exp(-tl.abs(at_N))
    y_N = x_N * tl.where(at_N < 0, below_N, 1.0) / (1.0 + below_N)
    if factor is not None:
        y_N *= tl.load(factor + n, mask=is_n, other=0.0).to(tl.float32)
    tl.store(y + n, y_N.to(y.dtype.element_ty), mask=is_n)


def rotate(q_THD: Tensor, k_TGD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> None:
    (num_rows, heads, dim), kv_heads = q_THD.shape, k_TGD.shape[1]
    grid = num_rows, triton.cdiv(heads, HEADS) + triton.cdiv(kv_heads, HEADS)
    _rotate[grid](q_THD, k_TGD, cos_1TD, sin_1TD, H=heads, G=kv_heads, D=dim, HEADS=HEADS)


def activate(x: Tensor, factor: Tensor | None, curve: Curve, y: Tensor) -> None:
    count = x.numel()
    _activate[(triton.cdiv(count, WIDTH),)](x, factor, *curve, y, count, WIDTH=WIDTH)
