"""From several compiled adapters to as many that share one basis: LoRA-XS files, ``ΔW_k = B S_k A``.

Two ways to such a basis: `joint_basis` of the changes, and `reversible` of the factors' own vectors.

Where an adapter does not adapt a site it has no core there, and the others share the basis. Every file holds
the basis, since a file stands by itself; in memory equal bases are one (`timbre_methods.bases`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from timbre_methods.contract import Sites
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.merging.changes import Ingredient, factors_at
from timbre_methods.merging.joint_basis import JointBasis, joint_basis
from timbre_methods.merging.lora_file import AdapterFile, peft_config
from timbre_methods.merging.merge import adapted_paths, check_finite, check_result
from timbre_methods.merging.reversible import reversible_basis
from timbre_methods.shared_basis.lora_xs import AS_TRAINED, A, B
from timbre_methods.site_tensors import PREFIX

CollectionForm = Literal["full", "diagonal", "reversible"]


@dataclass(frozen=True, slots=True, eq=False)
class Compressed:
    """One adapter of the collection."""

    file: AdapterFile
    relative_error: float
    """Of its change, in Frobenius norms over all its sites."""


@dataclass(frozen=True, slots=True, eq=False)
class Collection:
    """In the order of the ingredients; the bytes of the basis count once for all of them."""

    members: tuple[Compressed, ...]
    basis_bytes: int


MAX_CELLS = 2**27
"""The most numbers that the changes of one site may have in the span of their factors, together."""


def compress(
    ingredients: Sequence[Ingredient],
    sites: Sites,
    rank: int,
    form: CollectionForm,
    proceed: Callable[[], None] = lambda: None,
) -> Collection:
    """The ingredients' weights are not looked at. For ``reversible``, ``rank`` is the
    number of components.

    Raises `AdapterMismatch` for an adapter without a low-rank form or, where that matters, of another rank;
    `InvalidRecipe` for a rank that a site does not have. Nothing is computed before all are known to fit.
    """
    paths = adapted_paths(ingredients, sites)
    for path in paths:
        _check_kind(ingredients, path, sites[path].kind)
    components = rank
    if form == "reversible":
        rank = _one_rank(ingredients) * (1 + components)
    _check_size(ingredients, sites, paths, rank)
    bases: dict[str, JointBasis] = {}
    for path in paths:
        proceed()
        present = [each for each in ingredients if path in each.program.sites]
        pairs = [factors_at(each, path) for each in present]
        check_finite(path, *(tensor for pair in pairs for tensor in pair))
        bases[path] = (
            reversible_basis(pairs, components)
            if form == "reversible"
            else joint_basis(pairs, rank, form, proceed)
        )
    return Collection(
        tuple(_member(each, ingredients, bases, rank) for each in ingredients),
        sum(basis.a_RI.nbytes + basis.b_OR.nbytes for basis in bases.values()),
    )


def _check_kind(ingredients: Sequence[Ingredient], path: str, kind: str) -> None:
    for each in ingredients:
        if path in each.program.sites:
            factors_at(each, path)
            if kind != "linear":
                raise AdapterMismatch(
                    f"{each.label} ({each.method}) adapts {path}, and only linear layers share a basis here"
                )


def _check_size(ingredients: Sequence[Ingredient], sites: Sites, paths: Sequence[str], rank: int) -> None:
    """Of a basis of this rank, of what is computed for it, and of the files."""
    for path in paths:
        site = sites[path]
        most = min(site.out_features, site.in_features)
        if rank > most:
            raise InvalidRecipe(f"the basis would have rank {rank}, but at {path} at most {most} is possible")
        widths = [factors_at(each, path)[0].shape[0] for each in ingredients if path in each.program.sites]
        spans = min(sum(widths), site.out_features) * min(sum(widths), site.in_features)
        if len(widths) * spans > MAX_CELLS:
            raise InvalidRecipe(
                f"at {path} {len(widths)} adapters of {sum(widths)} ranks together take "
                f"{len(widths) * spans} numbers, but at most {MAX_CELLS} are computed with; compress fewer"
            )
    check_result(
        sum(
            rank * (sites[path].out_features + sites[path].in_features + rank)
            for each in ingredients
            for path in each.program.sites
        )
    )


def _one_rank(ingredients: Sequence[Ingredient]) -> int:
    """Of all of them at all sites."""
    found: int | None = None
    for each in ingredients:
        for path in each.program.sites:
            rank = factors_at(each, path)[0].shape[0]
            if found is not None and rank != found:
                raise AdapterMismatch(
                    f"{each.label} ({each.method}) has rank {rank} at {path}, others have {found}; kind "
                    "'reversible' takes adapters of one rank, 'joint_full' any"
                )
            found = rank
    return found or 0


def _member(
    own: Ingredient, ingredients: Sequence[Ingredient], bases: dict[str, JointBasis], rank: int
) -> Compressed:
    tensors: dict[str, Tensor] = {}
    whole = left_out = 0.0
    for path, basis in bases.items():
        if path not in own.program.sites:
            continue
        present = [each for each in ingredients if path in each.program.sites]
        place = next(index for index, each in enumerate(present) if each is own)
        stem = PREFIX + path
        tensors[f"{stem}.{A}"] = basis.a_RI.contiguous().clone()
        tensors[f"{stem}.{B}"] = basis.b_OR.contiguous().clone()
        tensors[stem + AS_TRAINED] = basis.s_KRR[place].contiguous().clone()
        whole += basis.whole_K[place]
        left_out += basis.left_out_K[place]
    paths = {path: None for path in bases if path in own.program.sites}
    config = peft_config("LORA_XS", paths, {"r": rank, "lora_alpha": rank, "init_lora_weights": True})
    error = math.sqrt(left_out / whole) if whole > 0 else 0.0
    return Compressed(AdapterFile(config, tensors), error)
