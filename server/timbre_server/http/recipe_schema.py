"""The body of a recipe, and which of its fields each kind reads. Knows no store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from timbre_server.errors import InvalidRequest
from timbre_server.http.bounds import FewFields, items
from timbre_server.http.openai_schema import MAX_MIX, MAX_WEIGHT
from timbre_server.http.upload import MAX_TEXT_BYTES
from timbre_store.digests import is_digest
from timbre_store.recipe import MIXTURES

Kind = Literal[
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd", "lego", "lorahub", "arrow",
    "routed",
]  # fmt: skip
READ: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "ties": ("rank", "density"),
    "dare_linear": ("rank", "density", "seed"),
    "dare_ties": ("rank", "density", "seed"),
    "magnitude_prune": ("rank", "density"),
    "svd": ("rank",),
    "lego": ("rank", "seed"),
    "lorahub": (),
    "arrow": ("top_k", "temperature", "general"),
    "routed": ("router", "top_k", "renormalised"),
}
"""What each kind reads beside its parents; another field would be ignored, and is refused."""
ALL_READ = ("rank", "density", "seed", "top_k", "temperature", "renormalised", "router", "general")
MAX_RANK = 4096
MAX_PARENTS = 64
"""Of a mixture of experts; of other kinds as many as a request may mix."""

Name = Annotated[str, Field(max_length=MAX_TEXT_BYTES)]


class RecipePart(FewFields):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ParentBody(RecipePart):
    name: Name
    weight: float = Field(1.0, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class RecipeBody(RecipePart):
    name: Name
    kind: Kind
    parents: Annotated[list[ParentBody], items(MAX_PARENTS, least=1)]
    rank: int | None = Field(None, ge=1, le=MAX_RANK)
    density: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    top_k: int | None = Field(None, ge=1, le=MAX_PARENTS)
    temperature: float | None = Field(None, ge=1e-6, le=1e6)
    renormalised: bool | None = None
    router: str | None = Field(None, max_length=MAX_TEXT_BYTES)
    """Digest of a file under ``/v1/blobs``."""
    general: Annotated[list[Name], items(MAX_PARENTS, least=1)] | None = None


def check_fields(body: RecipeBody) -> None:
    """Raises: InvalidRequest for a field that the kind does not read, one that it needs, or one out of what
    it can be."""
    read = READ[body.kind]
    for name in ALL_READ:
        if getattr(body, name) is not None and name not in read:
            said = f"expected {' and '.join(read)} at most" if read else "it takes parents with weights alone"
            raise InvalidRequest(f"{name} means nothing to the kind {body.kind!r}; {said}", param=name)
    most = MAX_PARENTS if body.kind in MIXTURES else MAX_MIX
    if len(body.parents) > most:
        raise InvalidRequest(
            f"these are {len(body.parents)} parents; expected at most {most} for the kind {body.kind!r}",
            param="parents",
        )
    if "density" in read and body.density is None:
        raise InvalidRequest(
            f"density is required for the kind {body.kind!r}: the fraction of values that it keeps, above 0 "
            "and at most 1",
            param="density",
        )
    if body.top_k is not None and body.top_k > len(body.parents):
        raise InvalidRequest(
            f"top_k is {body.top_k}; expected at most {len(body.parents)}, the number of parents",
            param="top_k",
        )
    if "router" in read and not is_digest(body.router or ""):
        raise InvalidRequest(
            f"router is {body.router!r}; expected sha256:<64 hex digits>, the digest of a safetensors file "
            "that was sent to PUT /v1/blobs/<digest>",
            param="router",
        )
