"""Float32 sums as numbers of another type, where both lie."""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads


def round_into(y: Tensor, sums: Tensor) -> Tensor:
    """``y``, which becomes what the float32 ``sums`` round to; both are contiguous."""
    if y.dtype is not torch.bfloat16:
        return y.copy_(sums)
    count = y.numel()
    kernel("timbre_rounded", ADDRESS, ADDRESS, NUMBER)(
        sums.data_ptr(), y.data_ptr(), count, num_threads(count)
    )
    return y
