"""The tensors of a safetensors file that is in memory, where they lie: the library copies each of them.

For files that were checked when they were stored (`timbre_store.safetensors_header`) and hashed since.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timbre_methods.stand_ins import DTYPES

_LENGTH_BYTES = 8


def tensors_in(content: memoryview) -> dict[str, Tensor]:
    """Views by name, in the header's order. They keep the content alive. Numbers that do not lie at a whole
    number of their own sizes, as other writers than the library may put them, are copied."""
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    header = json.loads(bytes(content[_LENGTH_BYTES:start]))
    header.pop("__metadata__", None)
    return {
        name: _view(content, DTYPES[entry["dtype"]], entry["shape"], start + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _view(content: memoryview, dtype: torch.dtype, shape: Sequence[int], offset: int) -> Tensor:
    count = math.prod(shape)
    if offset % dtype.itemsize:
        content, offset = memoryview(bytearray(content[offset : offset + count * dtype.itemsize])), 0
    flat_N = torch.frombuffer(content, dtype=dtype, count=count, offset=offset)
    return flat_N if len(shape) == 1 else flat_N.view(shape)
