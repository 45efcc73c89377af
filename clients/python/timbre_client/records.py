"""Adapters and models as the server describes them. Fields that a newer server adds are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Version:
    version: int
    digest: str


@dataclass(frozen=True, slots=True)
class Alias:
    alias: str
    target: str
    """``name``: follows the latest version; ``name@3``: stays."""


@dataclass(frozen=True, slots=True)
class RecipeParent:
    digest: str
    weight: float


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the server made an adapter of others. Numbers that the kind does not use are None."""

    kind: str
    parents: tuple[RecipeParent, ...]
    rank: int | None
    density: float | None
    seed: int | None
    member: str | None
    """Of a collection compressed together: the digest of the adapter whose place this one takes."""
    top_k: int | None = None
    temperature: float | None = None
    renormalised: bool | None = None
    router: str | None = None
    """Digest of the router's file."""
    general: tuple[str, ...] = ()
    """Digests of the adapters whose mean was taken from the parents."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Recipe:
        return Recipe(
            kind=body["kind"],
            parents=tuple(RecipeParent(item["digest"], item["weight"]) for item in body["parents"]),
            rank=body.get("rank"),
            density=body.get("density"),
            seed=body.get("seed"),
            member=body.get("member"),
            top_k=body.get("top_k"),
            temperature=body.get("temperature"),
            renormalised=body.get("renormalised"),
            router=body.get("router"),
            general=tuple(body.get("general", ())),
        )


@dataclass(frozen=True, slots=True)
class Pinned:
    """How the server keeps the one adapter that it has pinned."""

    mode: str
    sites: int
    """Layers of the base whose weights it has merged with the adapter's."""
    bytes: int
    """Memory that these take, beside the adapter's own."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One version of an adapter. The digest is its identity; name and version lead to it."""

    id: str
    name: str
    version: int
    digest: str
    created: int
    """Unix time."""
    method: str
    peft_type: str | None
    base_model_digest: str | None
    sites: tuple[str, ...]
    parameters: int
    stored_bytes: int
    prepared_bytes: int
    """Memory that it takes beside the model."""
    files: Mapping[str, str]
    """Digest by file name."""
    virtual_tokens: int = 0
    """Positions of every request's context that are the adapter's."""
    invocation_tokens: tuple[int, ...] = ()
    """Every prompt must hold them: the adapter acts from their last occurrence on."""
    recipe: Recipe | None = None
    """None for an adapter that was uploaded."""
    versions: tuple[Version, ...] = ()
    """Filled by `get_adapter`."""
    aliases: tuple[Alias, ...] = ()
    """Filled by `get_adapter`."""
    pinned: Pinned | None = None
    """Filled by `get_adapter` and `pin_adapter`."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Adapter:
        return Adapter(
            id=body["id"],
            name=body["name"],
            version=body["version"],
            digest=body["digest"],
            created=body["created"],
            method=body["method"],
            peft_type=body.get("peft_type"),
            base_model_digest=body.get("base_model_digest"),
            sites=tuple(body["sites"]),
            parameters=body["parameters"],
            stored_bytes=body["stored_bytes"],
            prepared_bytes=body["prepared_bytes"],
            files=dict(body["files"]),
            virtual_tokens=body.get("virtual_tokens", 0),
            invocation_tokens=tuple(body.get("invocation_tokens", ())),
            recipe=None if body.get("recipe") is None else Recipe.of(body["recipe"]),
            versions=tuple(Version(item["version"], item["digest"]) for item in body.get("versions", ())),
            aliases=tuple(Alias(item["alias"], item["target"]) for item in body.get("aliases", ())),
            pinned=_pinned(body.get("pinned")),
        )


def _pinned(body: Mapping[str, Any] | None) -> Pinned | None:
    return None if body is None else Pinned(body["mode"], body["sites"], body["bytes"])


@dataclass(frozen=True, slots=True)
class MadeAdapter:
    """What came of a recipe."""

    adapter: Adapter
    relative_error: float
    """Of the result to what was asked for, in Frobenius norms over all sites."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> MadeAdapter:
        return MadeAdapter(Adapter.of(body), body["relative_error"])


@dataclass(frozen=True, slots=True)
class Collection:
    """Adapters that share one basis, in the order in which they were asked for."""

    members: tuple[MadeAdapter, ...]
    basis_bytes: int
    """Memory that the basis takes, once for all of them; a member's own is its ``prepared_bytes``."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Collection:
        return Collection(tuple(map(MadeAdapter.of, body["data"])), body["basis_bytes"])


@dataclass(frozen=True, slots=True)
class AdapterPage:
    items: tuple[Adapter, ...]
    next_after: str | None
    """Give it as ``after`` for the next page; None: this was the last."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> AdapterPage:
        items = tuple(Adapter.of(item) for item in body["data"])
        return AdapterPage(items, body["last_id"] if body["has_more"] else None)


@dataclass(frozen=True, slots=True)
class Model:
    """What a request may name as its model: the base, or an adapter on it by name or alias."""

    id: str
    parent: str | None
    """The base model of an adapter."""
    root: str | None
    """What the id leads to now: an adapter's ``name@sha256:…``, or the base's first name."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Model:
        return Model(body["id"], body.get("parent"), body.get("root"))


@dataclass(frozen=True, slots=True)
class ModelPage:
    items: tuple[Model, ...]
    next_after: str | None
    """Give it as ``after`` for the next page; None: this was the last."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> ModelPage:
        items = tuple(Model.of(item) for item in body["data"])
        more = bool(body.get("has_more")) and bool(items)
        return ModelPage(items, items[-1].id if more else None)
