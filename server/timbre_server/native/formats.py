"""In which formats factors of low rank lie in memory: in 16 bits where these say exactly what float32 does,
or where the server was told to round to them.

Many adapters are uploaded in 16 bits. In float32 half of their memory, and of what a step reads, is zeros.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, is_loaded, kernel

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""A kernel is told of one by its place here."""

NARROW = ((torch.bfloat16, 8), (torch.float16, 11))
"""Those of 16 bits, and how many bits a number has there, from its first to its last that is set."""
_LOST, _LOST_OF_HALF = (1 << 16) - 1, (1 << 13) - 1
"""Bits of float32's fractions that bfloat16 has not, and float16."""
_LARGEST = 0x7F7F0000
"""Bits of the largest number of bfloat16."""
LOOKED_AT = 4
"""Numbers of a tensor that most often tell where it does not go."""


def format_of(tensor: Tensor) -> int:
    return FORMATS.index(tensor.dtype)


def formats_in(formats: Iterable[int]) -> int:
    """Which formats there are among these, as one number: bit n for format n."""
    return sum(1 << each for each in set(formats))


def narrowed(values: Tensor, rounded_to: torch.dtype | None = None) -> Tensor:
    """In a format of 16 bits from which every value comes back as it is; else rounded to the one that is
    given, unless a value is too large for it; else the very same tensor."""
    few = values[:1].flatten()[:LOOKED_AT].tolist()
    for dtype, bits in NARROW:
        if all((math.frexp(value)[0] * 2**bits).is_integer() for value in few):
            narrow = values.to(dtype)
            # Kernels read float16 as if all were finite.
            comes_back = torch.equal(narrow.to(values.dtype), values)
            if comes_back and (dtype is torch.bfloat16 or bool(narrow.isfinite().all())):
                return narrow
    return values if rounded_to is None or not _fit(values, rounded_to) else values.to(rounded_to)


def narrowed_rows(blocks: Sequence[Tensor], rounded_to: torch.dtype | None = None) -> Tensor:
    """All rows of some matrices, `narrowed` together: contiguous, in storage of exactly their size."""
    if is_loaded() and len({each.shape[1:] for each in blocks}) == 1 and all(map(_is_read, blocks)):
        shape = sum(each.shape[0] for each in blocks), blocks[0].shape[1]
        narrow, found = torch.empty(shape, dtype=torch.bfloat16), array("q", [0, 0])
        there, any_bit = narrow.data_ptr(), found.buffer_info()[0]
        for block in blocks:
            steps = block.stride()
            _narrow()(block.data_ptr(), *block.shape, *steps, there, any_bit, any_bit + found.itemsize, 1)
            there += block.numel() * narrow.itemsize
        comes_back, may_be_half = not found[0] & _LOST, not found[0] & _LOST_OF_HALF
        is_rounded = rounded_to is torch.bfloat16 and not may_be_half
        if found[1] <= _LARGEST and (comes_back or is_rounded):
            return narrow
    return narrowed(torch.cat(list(blocks)), rounded_to)


def _is_read(block: Tensor) -> bool:
    return block.is_cpu and block.dtype is torch.float32 and block.dim() == 2


@cache
def _narrow() -> Callable[..., None]:
    return kernel("timbre_narrowed", ADDRESS, *[NUMBER] * 4, *[ADDRESS] * 3)


def _fit(values: Tensor, dtype: torch.dtype) -> bool:
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return bool(-torch.finfo(dtype).max <= least) and bool(most <= torch.finfo(dtype).max)
