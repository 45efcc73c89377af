"""The waist between HTTP and merges: what a recipe gave, before it is registered."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from timbre_store.recipe import Recipe
from timbre_store.records import AdapterRecord


@dataclass(frozen=True, slots=True)
class MadeFiles:
    """An adapter's two files, and how they came about."""

    config: bytes
    tensors: bytes
    recipe: Recipe
    """With every number that was used."""
    relative_error: float
    """Of the result to what was asked for, in Frobenius norms over all sites."""


@dataclass(frozen=True, slots=True)
class MadeCollection:
    """Adapters that share one basis, in the order of the recipe's parents."""

    members: tuple[MadeFiles, ...]
    basis_bytes: int
    """Memory that the basis takes, once for all of them."""


Merge = Callable[[Recipe, Sequence[AdapterRecord]], Awaitable[MadeFiles]]
"""``merge(recipe, parents)``: parents in the recipe's order, then its general adapters; none of them a mix.

Raises: MethodError for what does not go together; QueueFull; StoreError."""

Compress = Callable[[Recipe, Sequence[AdapterRecord]], Awaitable[MadeCollection]]
"""``compress(recipe, parents)``, as `Merge`: one adapter for each parent."""
