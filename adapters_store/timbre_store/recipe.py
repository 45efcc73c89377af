"""How an adapter was made of others, as its manifest says it. Knows digests and numbers, and no arithmetic.

The kind ``linear`` is a *mix*: it has no tensors of its own and stands for the weighted sum of its parents,
which must stay as long as it does. All other kinds made tensors of theirs, and the parents may go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from timbre_store.digests import is_digest
from timbre_store.errors import UnsafeFile

MIX = "linear"
MIXTURES = ("arrow", "routed")
"""Kinds whose parents become the experts of one adapter."""
LATER = frozenset({"top_k", "temperature", "renormalised", "router", "general"})
"""Fields that came after the first manifests with recipes."""
TYPES: Mapping[str, type] = {
    "kind": str, "rank": int, "density": float, "seed": int, "top_k": int, "temperature": float,
    "renormalised": bool,
}  # fmt: skip


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
    top_k: int | None = None
    """Of a mixture of experts, as all that follow."""
    temperature: float | None = None
    renormalised: bool | None = None
    router: str | None = None
    """Digest of the router's file, which may be gone."""
    general: tuple[str, ...] = ()
    """Digests of adapters whose mean was taken from the parents."""

    @property
    def is_mix(self) -> bool:
        return self.kind == MIX

    @property
    def is_mixture(self) -> bool:
        return self.kind in MIXTURES

    def to_raw(self) -> dict[str, Any]:
        """As a JSON object, without what is `LATER` and says nothing: older manifests keep their digests."""
        raw = {**asdict(self), "general": list(self.general)}
        return {name: value for name, value in raw.items() if name not in LATER or value not in (None, [])}

    @staticmethod
    def from_raw(raw: Any) -> Recipe:
        """From the JSON object in a manifest. Raises: UnsafeFile."""
        names = {field.name for field in fields(Recipe)}
        if not (isinstance(raw, dict) and names - LATER <= raw.keys() <= names):
            expected = ", ".join(sorted(names - LATER))
            raise UnsafeFile(f"the manifest's recipe is not an object of {expected}")
        parents, general = raw["parents"], raw.get("general", [])
        if not (isinstance(parents, list) and parents and all(map(_is_parent, parents))):
            raise UnsafeFile("the manifest's recipe has no list of parents, each with digest and weight")
        for name, kind in TYPES.items():
            found = raw.get(name)
            if type(found) is not kind and (found is not None or name == "kind"):
                raise UnsafeFile(f"the manifest's recipe has {name} {found!r}")
        for name in ("member", "router"):
            if not (raw.get(name) is None or _is_digest(raw[name])):
                raise UnsafeFile(f"the manifest's recipe has {name} {raw[name]!r}; expected sha256:<64 hex>")
        if not (isinstance(general, list) and all(map(_is_digest, general))):
            raise UnsafeFile("the manifest's recipe has general that is no list of digests")
        given = {"parents": tuple(Parent(**parent) for parent in parents), "general": tuple(general)}
        return Recipe(**{**raw, **given})


def _is_parent(raw: Any) -> bool:
    return (
        isinstance(raw, dict)
        and raw.keys() == {"digest", "weight"}
        and _is_digest(raw["digest"])
        and type(raw["weight"]) is float
    )


def _is_digest(raw: Any) -> bool:
    return isinstance(raw, str) and is_digest(raw)
