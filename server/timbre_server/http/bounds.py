"""How much of a body is looked at before it is refused.

pydantic makes an error of each wrong element of a list and of each field that an object should not have, and
a small body may have a million of them, which holds the event loop up for seconds. So a list is read up to
its first wrong element, and an object only when it has few fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, Field, model_validator

MAX_FIELDS = 256


def items(most: int, *, least: int = 0) -> Any:
    """The bounds of a list's length. They stand beside the list itself, before any `BeforeValidator`."""
    return Field(min_length=least, max_length=most, fail_fast=True)


def fields(most: int) -> Callable[[object], object]:
    """A check of an object's number of fields, to be made before they are looked at."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > most:
            raise ValueError(f"an object has {len(value)} fields; at most {most} are read")
        return value

    return check


_check_fields = fields(MAX_FIELDS)


class FewFields(BaseModel):
    """An object that has not more fields than are worth naming in an error."""

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: object) -> object:
        return _check_fields(value)
