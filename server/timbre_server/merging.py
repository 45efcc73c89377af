"""Merges of stored adapters, on one thread of the server's process that gives way to everything else.

Neither the engine's loop nor the event loop waits for it, and it runs at the lowest priority, so a step takes
the processor from it whenever it likes. Adapters are compiled without the base's values, which lie in another
process: those that are made of them when they are loaded are refused by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save

from timbre_methods.contract import Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidRecipe, MethodError
from timbre_methods.merging.bind import ArrowChoice, RouterChoice, bind_arrow, bind_routed, check_cells
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.compress import CollectionForm, compress
from timbre_methods.merging.lora_file import AdapterFile
from timbre_methods.merging.merge import MergeNumbers, merge
from timbre_methods.prompt_contract import Frame
from timbre_methods.registry import compile_adapter
from timbre_server.errors import Draining, QueueFull
from timbre_server.made import MadeCollection, MadeFiles
from timbre_store.finite import check_values
from timbre_store.limits import StoreLimits
from timbre_store.reader import open_adapter, require_blob, verify_blob
from timbre_store.recipe import Recipe
from timbre_store.records import AdapterRecord
from timbre_store.safetensors_header import read_header

MAX_OPEN = 4
"""Merges that run or wait; a further one is sent away, for each may take minutes."""
RETRY_S = 30.0
LOWEST_PRIORITY = 19
FORMS: Mapping[str, CollectionForm] = {
    "joint_full": "full",
    "joint_diagonal": "diagonal",
    "reversible": "reversible",
}
"""Recipes of collections, by the form of a member's core."""

Made = TypeVar("Made")


class Merges:
    """For one base model and one store. `merge` belongs to the event loop."""

    def __init__(self, store_root: Path, sites: Sites, frame: Frame) -> None:
        self._store_root = store_root
        self._sites = sites
        self._frame = frame
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="merge", initializer=give_way)
        self._places = threading.BoundedSemaphore(MAX_OPEN)
        self._closing = threading.Event()

    async def merge(self, recipe: Recipe, parents: Sequence[AdapterRecord]) -> MadeFiles:
        """See `timbre_server.made.Merge`."""
        return await self._in_turn(self._merged, recipe, parents)

    async def compress(self, recipe: Recipe, parents: Sequence[AdapterRecord]) -> MadeCollection:
        """See `timbre_server.made.Compress`."""
        return await self._in_turn(self._compressed, recipe, parents)

    async def _in_turn(
        self,
        make: Callable[[Recipe, Sequence[AdapterRecord]], Made],
        recipe: Recipe,
        parents: Sequence[AdapterRecord],
    ) -> Made:
        self._proceed()
        if self._frame.stack:
            raise InvalidRecipe(
                "on repeated layers (--layer-replication) only kind 'linear' is made: no file says of what "
                "is computed that it is for them"
            )
        if not self._places.acquire(blocking=False):
            raise QueueFull(
                f"{MAX_OPEN} recipes are being made; try again when one is", retry_after_s=RETRY_S
            )
        future = self._thread.submit(make, recipe, tuple(parents))
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Gives up what runs, at its next site, and what waits."""
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _proceed(self) -> None:
        if self._closing.is_set():
            raise Draining("the server stops; the recipe was given up")

    @torch.inference_mode()
    def _merged(self, recipe: Recipe, parents: Sequence[AdapterRecord]) -> MadeFiles:
        if recipe.is_mixture:
            check_cells(sum(record.manifest.parameters for record in parents))
            _check_tensors(recipe, [set(record.manifest.sites) for record in parents])
            return _files(self._bound(recipe, self._ingredients(recipe, parents)), recipe, relative_error=0.0)
        numbers = MergeNumbers(
            recipe.kind,
            rank=recipe.rank,
            density=1.0 if recipe.density is None else recipe.density,
            seed=recipe.seed or 0,
        )
        made = merge(numbers, self._ingredients(recipe, parents), self._sites, self._proceed)
        return _files(made.file, replace(recipe, rank=made.rank), made.relative_error)

    def _bound(self, recipe: Recipe, ingredients: Sequence[Ingredient]) -> AdapterFile:
        assert recipe.top_k is not None
        experts, general = ingredients[: len(recipe.parents)], ingredients[len(recipe.parents) :]
        if recipe.kind == "arrow":
            assert recipe.temperature is not None
            choice = ArrowChoice(recipe.top_k, recipe.temperature)
            return bind_arrow(experts, general, self._sites, choice, self._proceed)
        assert recipe.router is not None
        assert recipe.renormalised is not None
        router, chosen = self._router(recipe.router), RouterChoice(recipe.top_k, recipe.renormalised)
        return bind_routed(experts, router, self._sites, chosen, self._proceed)

    def _router(self, digest: str) -> Tensors:
        """A file that no registration has looked at. Raises: StoreError."""
        path = require_blob(self._store_root, digest)
        verify_blob(path, digest)
        check_values(path, read_header(path, StoreLimits()))
        return load_file(path)

    @torch.inference_mode()
    def _compressed(self, recipe: Recipe, parents: Sequence[AdapterRecord]) -> MadeCollection:
        ingredients = self._ingredients(recipe, parents)
        assert recipe.rank is not None
        form = FORMS[recipe.kind]
        made = compress(ingredients, self._sites, recipe.rank, form, self._proceed)
        members = [
            _files(each.file, replace(recipe, member=parent.digest), each.relative_error)
            for each, parent in zip(made.members, recipe.parents, strict=True)
        ]
        return MadeCollection(tuple(members), made.basis_bytes)

    def _ingredients(self, recipe: Recipe, parents: Sequence[AdapterRecord]) -> list[Ingredient]:
        weights = [*(parent.weight for parent in recipe.parents), *(1.0 for _ in recipe.general)]
        return [self._read(record, weight) for record, weight in zip(parents, weights, strict=True)]

    def _read(self, record: AdapterRecord, weight: float) -> Ingredient:
        self._proceed()
        label, method = f"{record.name}@{record.version}", record.manifest.method
        files = open_adapter(self._store_root, record.digest)
        verify_blob(files.tensors_path, files.manifest.tensors_digest)
        tensors = load_file(files.tensors_path)
        if files.derived_path is not None:
            verify_blob(files.derived_path, files.manifest.derived_digest or "")
            tensors |= load_file(files.derived_path)
        try:
            program = compile_adapter(files.config, tensors, self._sites, self._frame)
        except MethodError as error:
            raise AdapterMismatch(f"{label} ({method}) can no longer be read: {error}") from error
        except RuntimeError as error:
            raise AdapterMismatch(  # One of its tensors met one of the base's, which has no values here.
                f"{label} ({method}) is made of the base's own weights when it is loaded, and this kind "
                "needs a change that stands by itself; mix it with kind 'linear'"
            ) from error
        return Ingredient(label, method, program, weight, files.config)


def _check_tensors(recipe: Recipe, sites: Sequence[set[str]]) -> None:
    """Raises `InvalidRecipe` for a mixture whose file would have more tensors than any may have."""
    num_layers, most = len(set[str]().union(*sites)), StoreLimits().max_tensors
    count = num_layers * (2 * len(recipe.parents) + (recipe.kind == "routed"))
    if count > most:
        raise InvalidRecipe(
            f"{len(recipe.parents)} experts on {num_layers} layers would be {count} tensors, at most {most} "
            "are in one adapter; bind fewer"
        )


def _files(file: AdapterFile, recipe: Recipe, relative_error: float) -> MadeFiles:
    return MadeFiles(json.dumps(file.config).encode(), save(file.tensors), recipe, relative_error)


def give_way() -> None:
    """Puts the calling thread, and those that it will start, behind all others. Linux alone has priorities of
    threads; elsewhere nothing changes."""
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
