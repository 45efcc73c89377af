"""Kernels that read rows of bfloat16 as they are.

Legend: T rows of the batch, I in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_server.native.joining import Joining
from timbre_server.operators.contract import Adds
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.uses import BoundInputKernels, Sources


class BoundNarrowInputKernels(BoundInputKernels):
    """Those that read rows of bfloat16 as they are, too."""

    def __init__(self, name: str, rows: LiveRows, sources: Sources, joining: str | None = None) -> None:
        """``joining``: the kernel that computes the base product, too."""
        super().__init__(name, rows, sources, is_told_format=True)
        self._joining = joining

    def adds(self, member: int) -> Adds:
        own = self._kernels[member]
        if own is None or self._joining is None:
            return super().adds(member)
        return Adds(sums=own.add, joining=Joining(self._joining, own.uses.address))

    def source(self, x_TI: Tensor) -> Tensor:
        return x_TI if x_TI.dtype is torch.bfloat16 else super().source(x_TI)
