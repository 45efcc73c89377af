"""Memory for what every step reads whole, in huge pages where the system has them.

In pages of 4 KiB reading stops at each one's end, to look up where the next one lies.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_PIECE = 32 * _PAGE
_ALIGNMENT = 64


class HugePages:
    """Gives room from large pieces, of which each lasts as long as anything in it."""

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def copied(self, tensor: Tensor) -> Tensor:
        """A contiguous copy. On a system without huge pages it lies in others."""
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > len(self._free):
            self._free = _piece(size)
        room, self._free = self._free[: tensor.nbytes], self._free[size:]
        return room.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _piece(size: int) -> Tensor:
    """Of so many bytes at least. Pages that nobody writes to take no memory."""
    memory = mmap.mmap(-1, max(_PIECE, size) + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # Of a kernel that was built without them.
            memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _PAGE :]
