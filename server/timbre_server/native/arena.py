"""Memory that stays where it is, for tensors that are written anew each time that a tape is played. At first
it is zero: what takes a number there for the place of something finds one."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from timbre_server.native.huge_pages import HugePages

LEAST_BYTES = 64
_SIZES = 8
"""Of pieces, up to each power of two. Those of powers of two alone would all begin where the cache
has the same few places for them."""


class Arena:
    """Pieces, whose sizes are rounded so that tensors of about as many bytes use the same ones. One is used
    again when the last tensor in it has died, and by whatever `begin` begins."""

    def __init__(self) -> None:
        self._pages = HugePages()
        self._pieces: dict[int, list[_Piece]] = {}
        self._by_address: dict[int, _Piece] = {}
        self._shared: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def begin(self) -> None:
        """All pieces are free, whoever has them."""
        for piece in self._by_address.values():
            piece.free()
        self._shared.clear()

    @property
    def num_bytes(self) -> int:
        return sum(size * len(pieces) for size, pieces in self._pieces.items())

    def empty(self, *shape: int) -> Tensor:
        """Of float32."""
        return self.like(torch.empty(shape, device="meta", dtype=torch.float32))

    def like(self, tensor: Tensor) -> Tensor:
        """A tensor of its shape, strides and type."""
        num_bytes = tensor.untyped_storage().nbytes()
        size = _rounded_up(num_bytes)
        pieces = self._pieces.setdefault(size, [])
        piece = next((piece for piece in pieces if piece.is_free), None)
        if piece is None:
            piece = _Piece(self._pages.zeros(size))
            pieces.append(piece)
            self._by_address[piece.address] = piece
        return piece.taken(tensor)

    def uncounted(self, tensor: Tensor) -> Tensor:
        """The same numbers as a tensor that does not keep its piece; the same one each time. Itself where it
        lies elsewhere."""
        if tensor.layout is not torch.strided:  # Such as oneDNN's weights, which have no address.
            return tensor
        piece = self._by_address.get(tensor.untyped_storage().data_ptr())
        if piece is None:
            return tensor
        known = self._shared.get(id(tensor))
        if known is not None and known[0]() is tensor:
            return known[1]
        shared = piece.shared(tensor)
        self._shared[id(tensor)] = weakref.ref(tensor), shared
        return shared


def _rounded_up(num_bytes: int) -> int:
    step = max(LEAST_BYTES, (1 << num_bytes.bit_length()) // _SIZES)
    return max(step, -(-num_bytes // step) * step)


class _Piece:
    """So many bytes, for one tensor and its views at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.address = memory.data_ptr()
        self._bytes: NDArray[np.uint8] = memory.numpy()
        self._user: Callable[[], object | None] = _nobody

    @property
    def is_free(self) -> bool:
        return self._user() is None

    def free(self) -> None:
        self._user = _nobody

    def taken(self, like: Tensor) -> Tensor:
        """A tensor that has the piece while it, or a view of it, lives."""
        user = self._bytes[:]
        self._user = weakref.ref(user)
        return _tensor(user, like)

    def shared(self, like: Tensor) -> Tensor:
        """One that has it no longer than others do."""
        return _tensor(self._bytes, like)


def _nobody() -> None:
    return None


def _tensor(memory: NDArray[np.uint8], like: Tensor) -> Tensor:
    count = like.untyped_storage().nbytes() // like.itemsize
    if not count:
        return torch.empty_like(like)
    numbers = torch.frombuffer(memory, dtype=like.dtype, count=count)
    return numbers.as_strided(like.shape, like.stride(), like.storage_offset())
