"""Changes added to what they change.

Legend: T rows of the batch, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timbre_server.operators.contract import Change


def rows_of(v: Tensor) -> Tensor:
    """All leading dimensions flattened to the rows of the batch."""
    return v.reshape(-1, v.shape[-1])


def added(v: Tensor, changes: Sequence[Change], *, is_own: bool = False) -> Tensor:
    """``v`` plus changes to some of its rows, summed in float32 and rounded once; v is modified only if it
    ``is_own``, the caller's alone.

    Rows that no change names keep their bits: float32 holds every half-precision value exactly.
    """
    if is_own and len(changes) == 1 and v.is_contiguous() and _is_plain(changes[0]):
        changes[0].add_to(rows_of(v))  # PyTorch sums in the wider type and rounds once: no copy is needed.
        return v
    if not changes:
        return v
    sum_TD = rows_of(v).to(torch.float32, copy=not is_own).contiguous()
    for change in changes:
        change.add_to(sum_TD)
    return sum_TD.to(v.dtype).view(v.shape)


def _is_plain(change: Change) -> bool:
    """Whether its values lie in memory, for rows in order."""
    return type(change) is Change and not isinstance(change.rows_N, Tensor)
