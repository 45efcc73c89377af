"""What the store answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from timbre_store.manifest import Manifest

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """One version of one name. The digest identifies the adapter; name and version only lead to it."""

    name: str
    version: int
    digest: str
    created_s: float
    """Unix time."""
    manifest: Manifest
    parts: tuple[MixPart, ...] = ()
    """What a mix stands for, where it was resolved; empty for an adapter with tensors of its own."""


@dataclass(frozen=True, slots=True)
class MixPart:
    adapter: AdapterRecord
    weight: float


@dataclass(frozen=True, slots=True)
class Alias:
    alias: str
    name: str
    version: int | None
    """None: follows the latest version."""

    @property
    def target(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Named:
    """What a name leads to now: an adapter's own, or an alias."""

    name: str
    record: AdapterRecord


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    items: tuple[Item, ...]
    next_after: str | None
    """Give it as ``after`` to get the next page; None: this was the last."""
