"""What a model's layers compute beside their products, each as one call.

The modules of `fused_rotary` and `fused_activation` make these calls, and do not know what answers: C++ on a
CPU (``rotary.cpp``, ``activation.cpp``), or Triton on a GPU (`triton_layers`).

Legend: T rows, H query heads, G KV heads, D key dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, REAL, ROWS, kernel

Curve = tuple[float, float]
"""Slope and bend of ``act(v) = v σ(slope v + bend v³)``."""

_IN_CPP = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """Both take contiguous tensors, of one of ``dtypes`` and on ``device``, and round once."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    """float32 is one of them."""
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """``q_THD, k_TGD, cos_1TD, sin_1TD``: turns q and k in place."""
    activate: Callable[[Tensor, Tensor | None, Curve, Tensor], None]
    """``x, factor, curve, y``: y becomes ``act(x)``, times the factor where there is one; y may be x."""
    failures: tuple[type[Exception], ...] = ()
    """What they raise where they cannot run."""


def in_cpp() -> LayerKernels:
    """Raises: LibraryUnavailable."""
    turns = ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS, ADDRESS, ROWS, NUMBER
    curves = ADDRESS, ADDRESS, REAL, REAL, ADDRESS, ROWS
    rotaries = {dtype: kernel(f"timbre_rotary_{name}", *turns) for dtype, name in _IN_CPP.items()}
    activations = {dtype: kernel(f"timbre_activation_{name}", *curves) for dtype, name in _IN_CPP.items()}

    def rotate(q_THD: Tensor, k_TGD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> None:
        (num_rows, num_heads, key_dim), num_kv_heads = q_THD.shape, k_TGD.shape[1]
        heads = q_THD.data_ptr(), num_heads, k_TGD.data_ptr(), num_kv_heads
        turns = cos_1TD.data_ptr(), sin_1TD.data_ptr()
        rotaries[q_THD.dtype](*heads, *turns, num_rows, key_dim, torch.get_num_threads())

    def activate(x: Tensor, factor: Tensor | None, curve: Curve, y: Tensor) -> None:
        factors = None if factor is None else factor.data_ptr()
        own = x.data_ptr(), factors, *curve, y.data_ptr()
        activations[x.dtype](*own, x.numel(), torch.get_num_threads())

    return LayerKernels(torch.device("cpu"), tuple(_IN_CPP), rotate, activate)
