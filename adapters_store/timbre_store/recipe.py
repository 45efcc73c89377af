"""How an adapter was made of others, as its manifest says it. Knows digests and numbers, and no arithmetic.

The kind ``linear`` is a *mix*: it has no tensors of its own and stands for the weighted sum of its parents,
which must stay as long as it does. All other kinds made tensors of theirs, and the parents may go.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from timbre_store.digests import is_digest
from timbre_store.errors import UnsafeFile

MIX = "linear"


@dataclass(frozen=True, slots=True)
class Parent:
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """Numbers that a kind does not use are None."""

    kind: str
    parents: tuple[Parent, ...]
    rank: int | None = None
    density: float | None = None
    seed: int | None = None
    member: str | None = None
    """Of a collection that was compressed together: the parent that this adapter takes the place of."""

    @property
    def is_mix(self) -> bool:
        return self.kind == MIX

    @staticmethod
    def from_raw(raw: Any) -> Recipe:
        """From the JSON object in a manifest. Raises: UnsafeFile."""
        names = {field.name for field in fields(Recipe)}
        if not (isinstance(raw, dict) and raw.keys() == names):
            raise UnsafeFile(f"the manifest's recipe is not an object of {', '.join(sorted(names))}")
        parents = raw["parents"]
        if not (isinstance(parents, list) and parents and all(map(_is_parent, parents))):
            raise UnsafeFile("the manifest's recipe has no list of parents, each with digest and weight")
        for name, kind in (("kind", str), ("rank", int), ("density", float), ("seed", int)):
            if type(raw[name]) is not kind and (raw[name] is not None or kind is str):
                raise UnsafeFile(f"the manifest's recipe has {name} {raw[name]!r}")
        member = raw["member"]
        if not (member is None or (isinstance(member, str) and is_digest(member))):
            raise UnsafeFile(f"the manifest's recipe has member {member!r}; expected sha256:<64 hex>")
        return Recipe(**{**raw, "parents": tuple(Parent(**parent) for parent in parents)})


def _is_parent(raw: Any) -> bool:
    return (
        isinstance(raw, dict)
        and raw.keys() == {"digest", "weight"}
        and isinstance(raw["digest"], str)
        and is_digest(raw["digest"])
        and type(raw["weight"]) is float
    )
