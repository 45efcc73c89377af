"""Sizes that a config names and a tensor has: a rank, a count of coefficients, the length of a block."""

from __future__ import annotations

from collections.abc import Mapping

from timbre_methods.config import shown
from timbre_methods.errors import InvalidTensors
from timbre_methods.site_tensors import SiteTensors


def check_named_size(
    found: SiteTensors, key: str, size: int, words: str, default: int, pattern: Mapping[str, int] | None
) -> None:
    """The size of the tensor under ``key``, given in ``words`` too, must be one of the config's.

    Which layer has which is not looked up: a pattern's order does not survive the writing of the file.
    Raises `InvalidTensors`.
    """
    if size == default:
        return
    others = (pattern or {}).values()
    if size not in others:
        named = shown(sorted({default, *others}))
        raise InvalidTensors(f"{found.name_of(key)}: found {words}, the config says {named}")
