"""What all kernels share: tables on the device, addresses of tensors, and how products are rounded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["ieee", "tf32x3", "tf32"]
"""Of a product of float32 blocks: as the twin's; in three products on tensor cores, close to it; or in one,
with ten bits of mantissa. Sums are float32 in all of them."""


def numbers(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """A table of int32: of rows, ranks, and what else counts less than 2^31."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Where contiguous tensors begin, int64. Whoever keeps this keeps the tensors."""
    assert all(tensor.is_contiguous() and tensor.device.type == device.type for tensor in tensors)
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=device)
