"""Memory for what every step reads whole, in huge pages where the system has them.

In pages of 4 KiB reading stops at each one's end, to look up where the next one lies.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
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
        return self.zeros(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)

    def zeros(self, num_bytes: int) -> Tensor:
        """Of uint8, in memory that nobody has had."""
        size = _aligned(num_bytes)
        if size > len(self._free):
            try:
                self._free = _region(max(_PIECE, size))
            except OSError:  # The process has as many regions as it may.
                return torch.zeros(num_bytes, dtype=torch.uint8)
        room, self._free = self._free[:num_bytes], self._free[size:]
        return room


def move_together(tensors: Iterable[Tensor]) -> None:
    """Move what lies in these tensors' storages, that nobody else has any of, to memory that lasts as long as
    one of them: whole huge pages, and small ones for the rest. Nothing where no huge page would be full, or
    where the system gives none: it has a limit on how many such pieces a process may have."""
    each = {id(tensor): tensor for tensor in tensors if tensor.numel()}.values()
    storages = {storage.data_ptr(): storage for storage in (tensor.untyped_storage() for tensor in each)}
    size = sum(_aligned(storage.nbytes()) for storage in storages.values())
    if size < _PAGE:
        return
    try:
        free = _region(size)
    except OSError:
        return
    places: dict[int, int] = {}
    for before, storage in storages.items():
        room, free = free[: storage.nbytes()], free[_aligned(storage.nbytes()) :]
        room.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
        places[before] = int(room.storage_offset())
    for tensor in each:
        place = places[tensor.untyped_storage().data_ptr()] // tensor.itemsize + tensor.storage_offset()
        tensor.set_(free.untyped_storage(), place, tensor.shape, tensor.stride())


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _region(size: int) -> Tensor:
    """Of so many bytes. Pages that nobody writes to take no memory."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _PAGE
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # Of a kernel that was built without them.
            memory.madvise(mmap.MADV_HUGEPAGE, start, size // _PAGE * _PAGE)
    return whole[start : start + size]
