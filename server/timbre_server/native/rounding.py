"""Numbers of bfloat16 as float32, and back; and copies."""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, ROWS, is_loaded, kernel

_NAMES = {
    (torch.float32, torch.bfloat16): "timbre_rounded",
    (torch.bfloat16, torch.float32): "timbre_widened",
    (torch.float32, torch.float32): "timbre_copied",
}
"""By the types of x and y."""


def rounded(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous float32 ``sums`` in this type, in C++ if there is any."""
    if dtype is sums.dtype or not is_loaded():
        return sums.to(dtype)
    return round_into(torch.empty_like(sums, dtype=dtype), sums)


def round_into(y: Tensor, sums: Tensor) -> Tensor:
    """``y``, which becomes what the float32 ``sums`` round to; both are contiguous."""
    return _converted(y, sums)


def widen_into(y: Tensor, x: Tensor) -> Tensor:
    """The float32 ``y``, which becomes what x is; both are contiguous."""
    return _converted(y, x)


def _converted(y: Tensor, x: Tensor) -> Tensor:
    name = _NAMES.get((x.dtype, y.dtype))
    if name is None:
        return y.copy_(x)
    kernel(name, ADDRESS, ADDRESS, ROWS)(x.data_ptr(), y.data_ptr(), x.numel(), torch.get_num_threads())
    return y
