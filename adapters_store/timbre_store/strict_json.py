"""JSON from strangers: one meaning or none.

Python's own reader takes the last of two equal keys, guesses UTF-16, accepts NaN and makes 1e999 infinite.
Here each of these is refused, and so are deep nesting and strings that UTF-8 cannot carry.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from timbre_store.errors import UnsafeFile


def read_object(content: bytes, *, what: str, max_depth: int) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes; ``what`` names the file in messages. The caller bounds the length.

    Raises: UnsafeFile.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_refuse_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
    except RecursionError:
        raise UnsafeFile(f"{what} is nested too deeply; at most {max_depth} levels are read") from None
    except UnicodeDecodeError as error:
        raise UnsafeFile(f"{what} is not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise UnsafeFile(f"{what} cannot be read as JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise UnsafeFile(f"{what} holds a JSON {type(value).__name__}; expected an object")
    _check_nesting_and_text(value, what, max_depth)
    return value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:120]!r} stands twice in one object")
            seen.add(key)
    return fields


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"the number {literal[:40]} is too large")
    return number


def _whole(literal: str) -> int:
    try:
        return int(literal)
    except (
        ValueError
    ):  # Python reads no more than some thousand digits, and says what its programmers may do.
        raise ValueError(f"a number of {len(literal.lstrip('-'))} digits is too large") from None


def _check_nesting_and_text(value: Any, what: str, max_depth: int) -> None:
    level: list[Any] = [value]
    for _ in range(max_depth):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.keys())
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str) and not _encodable(item):
                raise UnsafeFile(f"{what} has a string with half a surrogate pair, {ascii(item)[:120]}")
        level = below
        if not level:
            return
    if any(isinstance(item, (dict, list)) for item in level):
        raise UnsafeFile(f"{what} is nested too deeply; at most {max_depth} levels are read")
    if any(isinstance(item, str) and not _encodable(item) for item in level):
        raise UnsafeFile(f"{what} has a string with half a surrogate pair")


def _encodable(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
