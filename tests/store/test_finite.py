from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from timbre_store.errors import UnsafeFile
from timbre_store.finite import check_values
from timbre_store.limits import StoreLimits
from timbre_store.safetensors_header import read_header

LARGE = 700_001
"""Elements: with 4 bytes each, more than two buffers, and no whole number of them."""


def check(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    check_values(path, read_header(path, StoreLimits()))


BAD_PATTERNS = {
    "F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    "F16": [0x7C00, 0xFC00, 0x7E00, 0x7C01, 0xFFFF],
    "BF16": [0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF],
}
GOOD_PATTERNS = {
    "F32": [0, 0x80000000, 1, 0x7F7FFFFF, 0xFF7FFFFF, 0x007FFFFF],
    "F16": [0, 0x8000, 1, 0x7BFF, 0xFBFF, 0x03FF],
    "BF16": [0, 0x8000, 1, 0x7F7F, 0xFF7F, 0x007F],
}
WORDS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}


@pytest.mark.parametrize("dtype", WORDS)
def test_the_largest_the_smallest_and_the_signed_zero_are_finite(
    tmp_path: Path, samples: ModuleType, dtype: str
) -> None:
    words = np.array(GOOD_PATTERNS[dtype], WORDS[dtype])
    check(tmp_path / "file", samples.tensor_file({"w": (dtype, [6], words.tobytes())}))


@pytest.mark.parametrize(("dtype", "pattern"), [(d, p) for d, ps in BAD_PATTERNS.items() for p in ps])
def test_nan_and_infinity_are_found_wherever_they_stand(
    tmp_path: Path, samples: ModuleType, dtype: str, pattern: int
) -> None:
    for place in (0, 1, 400_000, LARGE - 1):
        words = np.zeros(LARGE, WORDS[dtype])
        words[place] = pattern
        content = samples.tensor_file(
            {"fine": (dtype, [1], bytes(words.itemsize)), "w": (dtype, [LARGE], words.tobytes())}
        )
        with pytest.raises(UnsafeFile, match=f"'w' holds NaN or infinity at element {place};"):
            check(tmp_path / "file", content)


def test_the_first_tensor_in_the_file_is_named(tmp_path: Path, samples: ModuleType) -> None:
    nan = np.array([np.nan], "<f4").tobytes()
    content = samples.tensor_file(
        {"z": ("F32", [1], bytes(4)), "y": ("F32", [1], nan), "a": ("F32", [1], nan)}
    )
    with pytest.raises(UnsafeFile, match="'y'"):
        check(tmp_path / "file", content)


def test_integers_hold_what_they_like_and_truth_values_do_not(tmp_path: Path, samples: ModuleType) -> None:
    ones = b"\xff" * 8
    integers = {
        "a": ("I64", [1], ones),
        "b": ("I32", [2], ones),
        "c": ("I16", [4], ones),
        "d": ("U8", [8], ones),
    }
    check(tmp_path / "file", samples.tensor_file(integers))
    check(tmp_path / "file", samples.tensor_file({"t": ("BOOL", [2], b"\0\1")}))
    with pytest.raises(UnsafeFile, match="'t' holds a byte that is neither 0 nor 1 at element 1"):
        check(tmp_path / "file", samples.tensor_file({"t": ("BOOL", [2], b"\0\2")}))


def test_a_float_that_does_not_begin_at_a_multiple_of_its_size_is_read_right(
    tmp_path: Path, samples: ModuleType
) -> None:
    value = np.array([1.0, np.inf], "<f4").tobytes()
    content = samples.tensor_file({"odd": ("U8", [3], b"\xff\x7f\xff"), "w": ("F32", [2], value)})
    with pytest.raises(UnsafeFile, match="'w' holds NaN or infinity at element 1"):
        check(tmp_path / "file", content)


def test_memory_does_not_grow_with_the_file(tmp_path: Path, samples: ModuleType) -> None:
    path = tmp_path / "file"
    header = b'{"w":{"dtype":"F32","shape":[16777216],"data_offsets":[0,67108864]}}'
    with path.open("wb") as sparse:
        sparse.write(samples.raw_file(header))
        sparse.truncate(8 + len(header) + (64 << 20))
    tracemalloc.start()
    try:
        check_values(path, read_header(path, StoreLimits()))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 8 << 20
