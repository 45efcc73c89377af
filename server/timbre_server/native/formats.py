"""In which formats factors of low rank lie in memory: in 16 bits where these say exactly what float32 does,
or where the server was told to round to them.

Many adapters are uploaded in 16 bits. In float32 half of their memory, and of what a step reads, is zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""A kernel is told of one by its place here."""

NARROW = ((torch.bfloat16, 8), (torch.float16, 11))
"""Those of 16 bits, and how many bits a number has there, from its first to its last that is set."""
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
            if torch.equal(narrow.to(values.dtype), values):
                return narrow
    return values if rounded_to is None or not _fit(values, rounded_to) else values.to(rounded_to)


def _fit(values: Tensor, dtype: torch.dtype) -> bool:
    if not values.numel():
        return True
    least, most = torch.aminmax(values)
    return bool(-torch.finfo(dtype).max <= least) and bool(most <= torch.finfo(dtype).max)
