"""What parts and their bases consist of, whatever their kind: a load asks that of hundreds."""

from __future__ import annotations

from typing import Any


def values_of(part: Any) -> list[Any]:
    """In the order of its fields."""
    return [getattr(part, name) for name in part.__match_args__]
