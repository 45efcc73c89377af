"""Files that a stranger might send. The first group is what the safetensors library itself lets through."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from timbre_store.errors import UnsafeFile
from timbre_store.limits import StoreLimits
from timbre_store.safetensors_header import read_header

ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EIGHT = bytes(8)


def file(header: str | bytes, content: bytes = EIGHT, *, claimed_bytes: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    length = len(raw) if claimed_bytes is None else claimed_bytes
    return length.to_bytes(8, "little") + raw + content


def entry(**changed: Any) -> bytes:
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changed}
    return file(json.dumps({"w": fields}))


def two(first: list[int], second: list[int], content_bytes: int) -> bytes:
    tensors = {
        "a": {"dtype": "U8", "shape": [first[1] - first[0]], "data_offsets": first},
        "b": {"dtype": "U8", "shape": [second[1] - second[0]], "data_offsets": second},
    }
    return file(json.dumps(tensors), bytes(content_bytes))


HOSTILE = {
    # What the library accepts
    "a tensor twice": (file(f'{{"w":{ENTRY},"w":{ENTRY}}}'), "stands twice"),
    "a field twice": (file('{"w":{"dtype":"F16","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "twice"),
    "a dimension of zero": (entry(shape=[0, 4], data_offsets=[0, 0]), "at least 1"),
    "a header of spaces": (file(f'{{"w":{ENTRY}}}' + " " * (1 << 20)), "at most 1048576"),
    "too many tensors": (
        file("{" + ",".join(f'"t{i}":{{}}' for i in range(4097)) + "}"),
        "names 4097 tensors; expected 1 to 4096",
    ),
    "a name that climbs": (file(f'{{"../../etc/passwd":{ENTRY}}}'), "tensor name"),
    "a name with two dots": (file(f'{{"a..b":{ENTRY}}}'), "tensor name"),
    "a name with a slash": (file(f'{{"a/b":{ENTRY}}}'), "tensor name"),
    "a name with NUL": (file(f'{{"a\\u0000b":{ENTRY}}}'), "tensor name"),
    "a name with a line feed at its end": (file(f'{{"a\\n":{ENTRY}}}'), "tensor name"),
    "an empty name": (file(f'{{"":{ENTRY}}}'), "tensor name"),
    "a name of 300 letters": (file(f'{{"{"a" * 300}":{ENTRY}}}'), "tensor name"),
    "spaces before the header": (file(f'  {{"w":{ENTRY}}}'), "begins with b' '"),
    "no tensor": (file("{}", b""), "names 0 tensors"),
    # What the library refuses, refused here as well
    "nothing": (b"", "has 0 bytes"),
    "seven bytes": (bytes(7), "has 7 bytes"),
    "a length and no header": (file("", b""), "has 8 bytes"),
    "a header of no bytes": (file(b"", EIGHT), "begins with b''"),
    "a header longer than the file": (file("{}", b"", claimed_bytes=1000), "the file has 10 in all"),
    "a header of 2^64 - 1 bytes": (file("{}", b"", claimed_bytes=2**64 - 1), "at most 1048576"),
    "a byte after the tensors": (file(f'{{"w":{ENTRY}}}', bytes(9)), "the tensors end at"),
    "a byte missing": (file(f'{{"w":{ENTRY}}}', bytes(7)), "the tensors end at"),
    "a ZIP archive behind it": (
        file(f'{{"w":{ENTRY}}}', EIGHT + b"PK\x05\x06" + bytes(18)),
        "the tensors end at",
    ),
    "a hole": (two([0, 4], [6, 8], 8), "leaves a hole"),
    "a hole at the beginning": (two([2, 4], [4, 8], 8), "leaves a hole"),
    "an overlap": (two([0, 4], [2, 8], 8), "overlaps"),
    "the same bytes twice": (two([0, 4], [0, 4], 4), "overlaps"),
    "a negative offset": (entry(data_offsets=[-8, 0]), "at least 0"),
    "offsets the wrong way round": (entry(data_offsets=[8, 0]), "begin first"),
    "three offsets": (entry(data_offsets=[0, 4, 8]), "expected"),
    "one offset": (entry(data_offsets=[8]), "expected"),
    "offsets beyond 2^63": (entry(data_offsets=[2**64, 2**64 + 8]), "whole numbers"),
    "a fraction as offset": (entry(data_offsets=[0, 8.0]), "whole numbers"),
    "a truth value as dimension": (entry(shape=[2, True]), "whole numbers"),
    "a negative dimension": (entry(shape=[-2]), "at least 1"),
    "dimensions whose product overflows": (entry(shape=[2**62, 2**62]), "needs"),
    "a shape that is no list": (entry(shape="2"), "not a list"),
    "nine dimensions": (entry(shape=[1] * 8 + [2]), "9 dimensions"),
    "too few bytes for the shape": (entry(shape=[3]), "needs 12"),
    "an unknown dtype": (entry(dtype="F31"), "expected one of F32"),
    "a dtype that no adapter has": (entry(dtype="F64", shape=[1]), "expected one of F32"),
    "a dtype that is a list": (entry(dtype=["F32"]), "dtype"),
    "a missing field": (file('{"w":{"dtype":"F32","shape":[2]}}'), "exactly dtype"),
    "a surplus field": (entry(strides=[1]), "exactly dtype"),
    "a tensor that is a number": (file('{"w":7}'), "exactly dtype"),
    "metadata that is a list": (file(f'{{"__metadata__":[],"w":{ENTRY}}}'), "__metadata__"),
    "metadata of numbers": (file(f'{{"__metadata__":{{"a":1}},"w":{ENTRY}}}'), "__metadata__"),
    "an array": (file(f"[{ENTRY}]"), "begins with b'\\['"),
    "a header that is not UTF-8": (file(b'{"\xff":' + ENTRY.encode() + b"}"), "not UTF-8"),
    "a header that does not end": (file(f'{{"w":{ENTRY}'), "cannot be read as JSON"),
    "deep nesting": (file('{"w":' + "[" * 200_000 + "]" * 200_000 + "}"), "too deeply"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "claims"),
    "a ZIP archive": (b"PK\x03\x04" + bytes(100), "claims"),
}


@pytest.mark.parametrize(("content", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UnsafeFile, match=reason) as refusal:
        read_header(path, StoreLimits())
    assert len(str(refusal.value)) < 600


def test_a_refusal_reads_no_more_than_the_header_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as sparse:
        sparse.write((99 << 20).to_bytes(8, "little") + b"{")
        sparse.truncate(100 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(UnsafeFile, match="at most 1048576"):
            read_header(path, StoreLimits())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_an_honest_file_is_described_in_the_order_of_its_bytes(tmp_path: Path, samples: ModuleType) -> None:
    path = tmp_path / "file"
    tensors = {
        "b.lora_A.weight": ("BF16", [2, 3], bytes(12)),
        "a.indices": ("I32", [2, 1], bytes(8)),
        "a.scale": ("F32", [], bytes(4)),
    }
    path.write_bytes(samples.tensor_file(tensors))
    header = read_header(path, StoreLimits())
    size = path.stat().st_size
    assert dict(header.metadata) == {"format": "pt"}
    assert [(e.name, e.dtype, e.shape, e.start - size, e.stop - size) for e in header.tensors.values()] == [
        ("b.lora_A.weight", "BF16", (2, 3), -24, -12),
        ("a.indices", "I32", (2, 1), -12, -4),
        ("a.scale", "F32", (), -4, 0),
    ]
    assert [entry.elements for entry in header.tensors.values()] == [6, 2, 1]


SHAPES = st.lists(st.integers(1, 4), max_size=3)
NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1", "BOOL": "?"}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9]{1,3})?", fullmatch=True),
        st.tuples(SHAPES, st.sampled_from(sorted(NUMPY))),
        min_size=1,
        max_size=5,
    )
)
def test_what_the_library_writes_is_read_as_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict[str, tuple[list[int], str]]
) -> None:
    content = save({name: np.zeros(shape, NUMPY[dtype]) for name, (shape, dtype) in wanted.items()})
    path = tmp_path_factory.mktemp("library") / "file"
    path.write_bytes(content)
    found = {name: (list(e.shape), e.dtype) for name, e in read_header(path, StoreLimits()).tensors.items()}
    assert found == wanted


@given(st.data())
def test_a_changed_file_is_refused_or_the_library_reads_the_same_from_it(
    tmp_path_factory: pytest.TempPathFactory, samples: ModuleType, data: st.DataObject
) -> None:
    content = bytearray(samples.adapter(1)[1])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) if data.draw(st.booleans()) else len(content) :]
    path = tmp_path_factory.mktemp("changed") / "file"
    path.write_bytes(content)
    try:
        header = read_header(path, StoreLimits())
    except UnsafeFile:
        return
    if all(entry.dtype != "BF16" for entry in header.tensors.values()):
        library = load(bytes(content))
        assert {name: entry.shape for name, entry in header.tensors.items()} == {
            name: array.shape for name, array in library.items()
        }
