"""Thin products with a base's weight, for methods that fold it into an adapter's factors when loading.

The weight is widened to float32 a few rows at a time, so that a large head needs little memory beside it.
On the meta device shapes alone come out.

Legend: I in features, O out features, R thin.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def weight_times(weight_OI: Tensor, thin_IR: Tensor) -> Tensor:
    """``W M`` [O, R] in float32, on M's device."""
    pieces = weight_OI.split_with_sizes(_sizes(weight_OI), 0)
    return torch.cat([piece.to(thin_IR.device, torch.float32) @ thin_IR for piece in pieces])


def times_weight(thin_RO: Tensor, weight_OI: Tensor) -> Tensor:
    """``M W`` [R, I] in float32, on M's device."""
    sizes = _sizes(weight_OI)
    product_RI = thin_RO.new_zeros(thin_RO.shape[0], weight_OI.shape[1])
    for piece, thin in zip(
        weight_OI.split_with_sizes(sizes, 0), thin_RO.split_with_sizes(sizes, 1), strict=True
    ):
        product_RI += thin @ piece.to(thin_RO.device, torch.float32)
    return product_RI


def _sizes(weight_OI: Tensor) -> list[int]:
    rows = weight_OI.shape[0]
    return [min(ROWS_AT_ONCE, rows - start) for start in range(0, rows, ROWS_AT_ONCE)]
