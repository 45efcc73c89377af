"""Reads the header of a safetensors file, and refuses every file that is not exactly what it says.

    8 bytes   N, little-endian, the header's length
    N bytes   JSON object: tensor name -> {dtype, shape, data_offsets}, padded with spaces at the end
    the rest  the tensors' bytes, one after the other without gap or overlap

This stands in front of the safetensors library because the library lets through duplicate keys, zero-size
dimensions, headers of 99 MB, any number of tensors, and any names. It looks at no tensor values (`finite`
does) and knows no method: which tensors an adapter should have is `Inspect`'s question.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from timbre_store.errors import UnsafeFile
from timbre_store.limits import StoreLimits
from timbre_store.strict_json import read_object

ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "U8": 1, "BOOL": 1}
)
"""The dtypes that adapters may have; the integers are for methods that store indices."""

_WHAT = "the safetensors header"
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})
_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its bytes are ``file[start:stop]``, row-major, little-endian."""

    name: str
    dtype: str
    """A key of `ITEM_BYTES`."""
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    tensors: Mapping[str, TensorEntry]
    """By name, in the order of their bytes in the file."""
    metadata: Mapping[str, str]


def read_header(path: Path, limits: StoreLimits) -> TensorHeader:
    """The validated header. Reads at most ``limits.max_header_bytes``, whatever the file claims.

    Raises: UnsafeFile naming the first thing that is wrong.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if file_bytes < _LENGTH_BYTES + 2:
            raise UnsafeFile(f"the safetensors file has {file_bytes} bytes; even an empty one has 10")
        if header_bytes > limits.max_header_bytes:
            raise UnsafeFile(
                f"{_WHAT} claims {header_bytes} bytes; at most {limits.max_header_bytes} are read"
            )
        if _LENGTH_BYTES + header_bytes > file_bytes:
            raise UnsafeFile(f"{_WHAT} claims {header_bytes} bytes, but the file has {file_bytes} in all")
        content = file.read(header_bytes)
    if not content.startswith(b"{"):
        raise UnsafeFile(f"{_WHAT} begins with {content[:1]!r}; expected '{{'")
    raw = read_object(content, what=_WHAT, max_depth=3)
    metadata = _metadata(raw.pop("__metadata__", {}))
    if not 1 <= len(raw) <= limits.max_tensors:
        raise UnsafeFile(f"{_WHAT} names {len(raw)} tensors; expected 1 to {limits.max_tensors}")
    data_start = _LENGTH_BYTES + header_bytes
    entries = [_entry(name, fields, data_start, limits) for name, fields in raw.items()]
    entries.sort(key=lambda entry: entry.start)
    _check_contiguous(entries, data_start, file_bytes)
    return TensorHeader(MappingProxyType({entry.name: entry for entry in entries}), metadata)


def _metadata(raw: Any) -> Mapping[str, str]:
    if not (isinstance(raw, dict) and all(isinstance(value, str) for value in raw.values())):
        raise UnsafeFile(f"{_WHAT} has __metadata__ that is not an object of strings")
    return MappingProxyType(raw)


def _entry(name: str, raw: Any, data_start: int, limits: StoreLimits) -> TensorEntry:
    if _TENSOR_NAME.fullmatch(name) is None or ".." in name:
        raise UnsafeFile(
            f"the tensor name {name[:120]!r} is not made of letters, digits, '_', '-' and single '.'"
        )
    if not isinstance(raw, dict) or raw.keys() != _ENTRY_KEYS:
        raise UnsafeFile(f"tensor {name!r} is not described by exactly dtype, shape and data_offsets")
    dtype = raw["dtype"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsafeFile(
            f"tensor {name!r} has dtype {str(dtype)[:40]!r}; expected one of {', '.join(ITEM_BYTES)}"
        )
    shape = _whole_numbers(raw["shape"], f"the shape of tensor {name!r}", minimum=1)
    if len(shape) > limits.max_tensor_rank:
        raise UnsafeFile(
            f"tensor {name!r} has {len(shape)} dimensions; at most {limits.max_tensor_rank} are read"
        )
    offsets = _whole_numbers(raw["data_offsets"], f"data_offsets of tensor {name!r}", minimum=0)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UnsafeFile(
            f"tensor {name!r} has data_offsets {list(offsets)[:4]}; expected [begin, end], begin first"
        )
    begin, end = offsets
    expected_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected_bytes:
        raise UnsafeFile(
            f"tensor {name!r} spans {end - begin} bytes; {dtype} {list(shape)} needs {expected_bytes}"
        )
    return TensorEntry(name, dtype, shape, data_start + begin, data_start + end)


def _whole_numbers(raw: Any, what: str, *, minimum: int) -> tuple[int, ...]:
    """The list as ints below 2^63; JSON's true and 1.0 are none."""
    if not isinstance(raw, list):
        raise UnsafeFile(f"{what} is not a list")
    for number in raw:
        if type(number) is not int or not minimum <= number < 1 << 63:
            raise UnsafeFile(f"{what} holds {str(number)[:40]}; expected whole numbers of at least {minimum}")
    return tuple(raw)


def _check_contiguous(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    expected_start = data_start
    for entry in entries:
        if entry.start != expected_start:
            kind = (
                "overlaps the tensor before it" if entry.start < expected_start else "leaves a hole before it"
            )
            raise UnsafeFile(
                f"tensor {entry.name!r} {kind}: it begins at {entry.start}, expected {expected_start}"
            )
        expected_start = entry.stop
    if expected_start != file_bytes:
        raise UnsafeFile(f"the tensors end at byte {expected_start}, but the file has {file_bytes} bytes")
