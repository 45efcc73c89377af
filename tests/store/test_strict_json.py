from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timbre_store.errors import UnsafeFile
from timbre_store.strict_json import read_object

REFUSED = {
    "nothing": b"",
    "an array": b"[1]",
    "a string": b'"a"',
    "null": b"null",
    "a key twice": b'{"r": 1, "r": 2}',
    "a key twice, spelt with an escape": b'{"r": 1, "\\u0072": 2}',
    "a key twice, deep inside": b'{"a": [{"b": {"r": 1, "r": 1}}]}',
    "NaN": b'{"alpha": NaN}',
    "infinity": b'{"alpha": Infinity}',
    "minus infinity": b'{"alpha": -Infinity}',
    "a number that overflows": b'{"alpha": 1e999}',
    "a number of 5,000 digits": b'{"r": ' + b"9" * 5000 + b"}",
    "UTF-16": '{"r": 1}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"r": 1}',
    "bytes that are not UTF-8": b'{"r": "\xff"}',
    "half a surrogate pair": b'{"r": "\\ud800"}',
    "half a surrogate pair in a key": b'{"\\udc00": 1}',
    "half a surrogate pair at the last level": b'{"a": {"b": {"c": "\\ud800"}}}',
    "four levels where three are read": b'{"a": {"b": {"c": {}}}}',
    "a million brackets": b'{"a": ' + b"[" * 1_000_000,
    "closed brackets, 900 deep": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "something after the end": b'{"r": 1} {"r": 2}',
    "a comment": b'{"r": 1 /* one */}',
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_json_that_readers_may_differ_about_is_refused(content: bytes) -> None:
    with pytest.raises(UnsafeFile, match=r"^the sample ") as refusal:
        read_object(content, what="the sample", max_depth=3)
    assert len(str(refusal.value)) < 400


def test_a_number_of_thousands_of_digits_is_refused_in_our_words() -> None:
    with pytest.raises(UnsafeFile) as refusal:
        read_object(b'{"r": -' + b"9" * 5000 + b"}", what="the sample", max_depth=3)
    assert str(refusal.value) == "the sample cannot be read as JSON: a number of 5000 digits is too large"


def test_an_object_as_deep_as_allowed_is_read() -> None:
    assert read_object(b' {"a": {"b": ["\\u00e9", 1.5, true]}} ', what="it", max_depth=3) == {
        "a": {"b": ["é", 1.5, True]}
    }


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(), below, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_what_python_writes_from_plain_values_is_read_back(value: dict[str, object]) -> None:
    assert read_object(json.dumps(value).encode(), what="it", max_depth=32) == value
