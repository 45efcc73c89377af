"""From several compiled adapters and a recipe's numbers to one plain LoRA. Knows no store and no server.

Kinds, by what they act on:

* `task_vectors`: ``ties``, ``dare_linear``, ``dare_ties``, ``magnitude_prune`` on ΔW, cut to the rank;
* ``svd``: the best LoRA of the rank of ``Σ w_k ΔW_k`` (PEFT's ``svd``), exact where the rank suffices;
* `factors`: ``lego`` and ``lorahub`` on A and B.

Adapters that do not adapt a site take no part there: they count as absent, not as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.merging import factors, task_vectors
from timbre_methods.merging.changes import (
    Ingredient,
    as_factors,
    check_ingredient,
    delta_at,
    factors_at,
    parts_at,
)
from timbre_methods.merging.lora_file import AdapterFile, lora_file
from timbre_methods.merging.truncation import (
    Truncated,
    square_norm_of_product,
    truncated,
    truncated_factors,
)

MERGE_KINDS = (*task_vectors.KINDS, "svd", "lego", "lorahub")
MAX_CELLS = 2**29
"""The most numbers that the changes of one site may have, of all adapters together, where they are built."""

MAX_RESULT_CELLS = 2**28
"""The most numbers of what is made, all files together: it is held whole until it is stored."""
MAX_DISTANCES = 2**20
"""The most pairs of units and clusters that ``lego`` measures at a site in each of its steps."""

Proceed = Callable[[], None]
"""Called before each site, and each step of long ones; raises to give up."""


@dataclass(frozen=True, slots=True)
class MergeNumbers:
    kind: str
    rank: int | None = None
    """None: the largest of the adapters' own."""
    density: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    file: AdapterFile
    rank: int
    """The largest of a site."""
    relative_error: float
    """Frobenius norms over all sites, difference by target. The target is what the kind makes of ΔW before
    it is cut to the rank; for ``lego`` and ``lorahub``, which have no such thing, it is ``Σ w_k ΔW_k``."""


def merge(
    numbers: MergeNumbers, ingredients: Sequence[Ingredient], sites: Sites, proceed: Proceed = lambda: None
) -> Merged:
    """The same file for the same numbers and adapters, whatever else the process draws.

    Raises `AdapterMismatch` for an adapter that this kind cannot take and `InvalidRecipe` for numbers that do
    not fit, naming adapter and site; nothing is computed before all of them are known to fit.
    """
    paths = adapted_paths(ingredients, sites)
    rank = _checked_rank(numbers, ingredients, paths, sites)
    check_result(sum(rank * (sites[path].out_features + sites[path].in_features) for path in paths))
    generator = torch.Generator().manual_seed(numbers.seed)
    found: dict[str, Truncated] = {}
    for path in paths:
        proceed()
        present = [each for each in ingredients if path in each.program.sites]
        found[path] = _at_site(numbers, present, sites[path], rank, generator, proceed)
        check_finite(path, found[path].a_RI, found[path].b_OR)
    whole = sum(each.whole for each in found.values())
    left_out = sum(each.left_out for each in found.values())
    if not whole > 0:
        raise InvalidRecipe(
            "nothing is left of the adapters; give them weights that are not 0, or keep a larger density"
        )
    return Merged(
        lora_file({path: (each.a_RI, each.b_OR) for path, each in found.items()}, sites),
        max(each.a_RI.shape[0] for each in found.values()),
        math.sqrt(left_out / whole),
    )


def check_result(num_cells: int) -> None:
    """Raises `InvalidRecipe` for more numbers than a recipe may make."""
    if num_cells > MAX_RESULT_CELLS:
        raise InvalidRecipe(
            f"the result would have {num_cells} numbers, but at most {MAX_RESULT_CELLS} are made at a time; "
            "choose a smaller rank, or fewer adapters"
        )


def adapted_paths(ingredients: Sequence[Ingredient], sites: Sites) -> list[str]:
    """The sites that any of them adapts, in model order. Raises `AdapterMismatch` for what is no change of a
    linear layer's or an embedding's weight."""
    for each in ingredients:
        check_ingredient(each)
        for path in each.program.sites:
            if sites[path].kind == "norm":
                raise AdapterMismatch(
                    f"{each.label} ({each.method}) changes the norm {path}, which a LoRA cannot; mix it with "
                    "kind 'linear'"
                )
            parts_at(each, path)
    return [path for path in sites if any(path in each.program.sites for each in ingredients)]


def _ranks(ingredients: Sequence[Ingredient], path: str) -> Iterator[tuple[Ingredient, int | None]]:
    """The rank of each adapter that is present at a site; None where it has no factors."""
    for each in ingredients:
        if path in each.program.sites:
            pairs = [as_factors(part) for part in each.program.sites[path]]
            yield each, None if None in pairs else sum(a.shape[0] for a, _ in filter(None, pairs))


def _checked_rank(
    numbers: MergeNumbers, ingredients: Sequence[Ingredient], paths: Sequence[str], sites: Sites
) -> int:
    largest = 0
    for path in paths:
        ranks = list(_ranks(ingredients, path))
        _check_factors(numbers, path, ranks)
        site = sites[path]
        cells = len(ranks) * site.out_features * site.in_features
        is_dense = numbers.kind in task_vectors.KINDS or any(rank is None for _, rank in ranks)
        if is_dense and cells > MAX_CELLS:
            raise InvalidRecipe(
                f"at {path} the changes of {len(ranks)} adapters have {cells} numbers together, but at most "
                f"{MAX_CELLS} are computed with; merge fewer, or use kind 'svd' or 'linear'"
            )
        most = min(site.out_features, site.in_features)
        if numbers.kind == "lego":
            most = sum(rank or 0 for _, rank in ranks)
            _check_distances(most, numbers.rank or max(rank or 0 for _, rank in ranks), path)
        if numbers.rank is not None and numbers.rank > most:
            raise InvalidRecipe(f"rank is {numbers.rank}, but at {path} at most {most} is possible")
        if numbers.rank is None:
            bare = next((each for each, rank in ranks if rank is None), None)
            if bare is not None:
                raise InvalidRecipe(
                    f"rank is missing: {bare.label} ({bare.method}) has none of its own at {path}"
                )
            largest = max(largest, *(rank or 0 for _, rank in ranks))
    return numbers.rank or largest


def _check_distances(num_units: int, num_clusters: int, path: str) -> None:
    if num_units * num_clusters > MAX_DISTANCES:
        raise InvalidRecipe(
            f"at {path} {num_units} units of the adapters in {num_clusters} clusters are more than lego "
            f"compares, {MAX_DISTANCES} distances; choose a smaller rank or use kind 'svd'"
        )


def _check_factors(numbers: MergeNumbers, path: str, ranks: Sequence[tuple[Ingredient, int | None]]) -> None:
    if numbers.kind not in ("lego", "lorahub"):
        return
    for each, rank in ranks:
        if rank is None:
            factors_at(each, path)
        first, expected = ranks[0]
        if numbers.kind == "lorahub" and rank != expected:
            raise AdapterMismatch(
                f"lorahub adds factors of one rank, but at {path} {first.label} has rank {expected} and "
                f"{each.label} has rank {rank}"
            )


def _at_site(
    numbers: MergeNumbers,
    present: Sequence[Ingredient],
    site: Site,
    rank: int,
    generator: torch.Generator,
    proceed: Proceed,
) -> Truncated:
    weights = [each.weight for each in present]
    has_factors = all(known is not None for _, known in _ranks(present, site.path))
    if numbers.kind in task_vectors.KINDS or not has_factors:
        shape = site.out_features, site.in_features
        deltas = [delta_at(each, site.path, shape) for each in present]
        if numbers.kind == "svd":
            whole = task_vectors.merged("magnitude_prune", deltas, weights, 1.0, generator)
        else:
            whole = task_vectors.merged(numbers.kind, deltas, weights, numbers.density, generator)
        del deltas
        check_finite(site.path, whole)
        return truncated(whole, rank)
    pairs = [factors_at(each, site.path) for each in present]
    a_CI = torch.cat([a for a, _ in pairs])
    b_OC = torch.cat([weight * b for (_, b), weight in zip(pairs, weights, strict=True)], dim=1)
    check_finite(site.path, a_CI, b_OC)
    if numbers.kind == "svd":
        return truncated_factors(a_CI, b_OC, rank)
    if numbers.kind == "lorahub":
        a_RI, b_OR = factors.lorahub(pairs, weights)
    else:
        a_RI, b_OR = factors.lego(pairs, weights, min(rank, len(a_CI)), generator, proceed)
    difference = square_norm_of_product(torch.cat([a_CI, a_RI]), torch.cat([b_OC, -b_OR], dim=1))
    return Truncated(a_RI, b_OR, square_norm_of_product(a_CI, b_OC), left_out=difference)


def check_finite(path: str, *tensors: Tensor) -> None:
    """Finite values may overflow where they are multiplied, and no decomposition takes what comes of it."""
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise InvalidRecipe(
            f"at {path} the adapters' values multiply to more than float32 holds; give smaller weights, or "
            "leave out the adapter that has them"
        )
