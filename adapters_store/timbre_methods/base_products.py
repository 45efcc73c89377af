"""Products with the base's weight in float32, in pieces, so that a large head needs little memory beside it.

Legend: I in features, O out features, R rank, C rows in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


def left_product(p_RO: Tensor, weight_OI: Tensor) -> Tensor:
    """``P W`` [R, I], where P is, in float32."""
    product_RI = p_RO.new_zeros(p_RO.shape[0], weight_OI.shape[1])
    for rows, w_CI in _pieces(weight_OI, p_RO.device):
        product_RI += p_RO[:, rows] @ w_CI
    return product_RI


def right_product(weight_OI: Tensor, v_IR: Tensor) -> Tensor:
    """``W V`` [O, R], or [O] for one vector [I], where V is, in float32."""
    return torch.cat([w_CI @ v_IR for _, w_CI in _pieces(weight_OI, v_IR.device)])


def _pieces(weight_OI: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight_OI.shape[0], ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield rows, weight_OI[rows].to(device, torch.float32)
