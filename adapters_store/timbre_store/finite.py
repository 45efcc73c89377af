"""Finds NaN and infinity in a safetensors file by their bit patterns: all exponent bits set.

Works on bytes, so bfloat16 needs no float type of its own. The file is read through one buffer of 1 MiB and
is not mapped: a mapping counts against memory, and a file that shrinks under it would kill the process.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from timbre_store.errors import UnsafeFile
from timbre_store.safetensors_header import ITEM_BYTES, TensorEntry, TensorHeader

_BUFFER_BYTES = 1 << 20
_EXPONENT_BITS: Mapping[str, int] = MappingProxyType({"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80})


def check_values(path: Path, header: TensorHeader) -> None:
    """Check that every float is finite and every BOOL byte is 0 or 1; other integers hold what they like.

    Raises: UnsafeFile naming the first tensor in the file that fails, and the place of the value in it.
    """
    buffer = np.empty(_BUFFER_BYTES, dtype=np.uint8)
    with path.open("rb", buffering=0) as file:
        for entry in header.tensors.values():
            if entry.dtype in _EXPONENT_BITS or entry.dtype == "BOOL":
                _check_tensor(file, entry, buffer)


def _check_tensor(file: BinaryIO, entry: TensorEntry, buffer: npt.NDArray[np.uint8]) -> None:
    item_bytes = ITEM_BYTES[entry.dtype]
    file.seek(entry.start)
    offset = 0
    while offset < entry.stop - entry.start:
        wanted = min(len(buffer), entry.stop - entry.start - offset)
        _read_fully(file, memoryview(buffer.data)[:wanted], entry.name)
        bad = _bad_items(buffer[:wanted], entry.dtype)
        if bad.size:
            place = offset // item_bytes + int(bad[0])
            found = "a byte that is neither 0 nor 1" if entry.dtype == "BOOL" else "NaN or infinity"
            raise UnsafeFile(
                f"tensor {entry.name!r} holds {found} at element {place}; re-train or repair the adapter"
            )
        offset += wanted


def _bad_items(chunk: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.intp]:
    """Indices of the values that are not finite (floats) or not a truth value (BOOL)."""
    if dtype == "BOOL":
        return np.flatnonzero(chunk > 1)
    exponent = _EXPONENT_BITS[dtype]
    if ITEM_BYTES[dtype] == 4:
        words = chunk.view("<u4")
        return np.flatnonzero((words & np.uint32(exponent)) == exponent)
    halves = chunk.view("<u2")
    return np.flatnonzero((halves & np.uint16(exponent)) == exponent)


def _read_fully(file: BinaryIO, into: memoryview, tensor: str) -> None:
    while into:
        count = file.readinto(into)  # type: ignore[attr-defined]
        if not count:
            raise UnsafeFile(
                f"the file ended inside tensor {tensor!r} while it was being read; upload it again"
            )
        into = into[count:]
