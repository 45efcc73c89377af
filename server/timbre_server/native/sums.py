"""``a + b`` of tensors as they lie, where PyTorch would set up more than it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, ROWS, LibraryUnavailable, kernel

_NAMES = {torch.float32: "timbre_sum_float32", torch.bfloat16: "timbre_sum_bfloat16"}


def sum_into(y: Tensor, a: Tensor | float, b: Tensor | float) -> bool:
    """Whether ``y`` became what PyTorch computes, bit by bit: of contiguous tensors on a CPU, all of
    y's shape and type."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    each = (y, a, b)
    is_served = y.dtype in _NAMES and all(
        x.dtype is y.dtype and x.shape == y.shape and x.is_contiguous() and x.device.type == "cpu"
        for x in each
    )
    if not is_served:
        return False
    try:
        run = kernel(_NAMES[y.dtype], ADDRESS, ADDRESS, ADDRESS, ROWS)
    except LibraryUnavailable:
        return False
    run(a.data_ptr(), b.data_ptr(), y.data_ptr(), y.numel(), torch.get_num_threads())
    return True
