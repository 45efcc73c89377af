"""Tensors and layers of the base without values, on the meta device, for what shapes alone can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from timbre_methods.config import shown
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""Element types by their names in safetensors headers."""


def meta_site(site: Site) -> Site:
    """The site without its values."""
    bias_O = None if site.bias_O is None else site.bias_O.to("meta")
    return replace(site, weight_OI=site.weight_OI.to("meta"), bias_O=bias_O)


def meta_tensor(name: str, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Of an entry of a safetensors header. Raises `InvalidTensors` for what no tensor has."""
    if dtype not in DTYPES:
        raise InvalidTensors(f"{name[:200]}: found dtype {shown(dtype)}, expected one of {', '.join(DTYPES)}")
    if any(size < 0 for size in shape) or math.prod(shape) >= 2**62:
        raise InvalidTensors(f"{name[:200]}: found the shape {shown(list(shape))}, which no tensor has")
    return torch.empty(tuple(shape), dtype=DTYPES[dtype], device="meta")
