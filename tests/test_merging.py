"""Merges of stored adapters of every method, on their own thread."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.prompt_contract import NO_FRAME
from timbre_methods.registry import methods, sites_of
from timbre_server.adapters.derivation import write_derived
from timbre_server.engine.messages import SiteShape
from timbre_server.errors import Draining, QueueFull
from timbre_server.inspection import inspector, meta_sites
from timbre_server.merging import LOWEST_PRIORITY, MAX_OPEN, Merges, give_way
from timbre_store.limits import StoreLimits
from timbre_store.recipe import Parent, Recipe
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

BASE = "sha256:" + "b" * 64
SHAPES = (
    SiteShape("embed_tokens", 30, 24, False, "embedding", is_transposed=True),
    SiteShape("layers.0.self_attn.q_proj", 24, 24, False),
    SiteShape("layers.0.mlp.up_proj", 40, 24, False),
    SiteShape("layers.0.mlp.down_proj", 24, 40, False),
    SiteShape("layers.0.mlp", 24, 24, False, "block"),
    SiteShape("layers.0.mlp.gate", 24, 24, False, "parameter"),
    SiteShape("norm", 24, 24, False, "norm"),
)
META = meta_sites(SHAPES)

NOT_MERGED = (
    "alora", "arrow", "beft", "boft", "deft", "dora", "ether", "glora", "hira", "hra", "hydra", "ia3", "lily",
    "llava_mole", "ln_tuning", "lora_mixer", "loramoe", "mixlora", "mola", "molora", "moram", "mov", "oft",
    "parameter_lora", "peanut", "phatgoose", "propulsion", "road", "sara", "smora", "ssf", "trainable_tokens",
    "xlora",
)  # fmt: skip
"""What turns or scales what passes, what routes, or is made of the base's weights when it is loaded."""


def real_sites() -> dict[str, Site]:
    """Weights whose magnitudes all differ."""
    sites = {}
    for path, site in META.items():
        if site.kind == "block":
            sites[path] = site
            continue
        count = site.weight_OI.numel()
        order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        weight = ((order + 1) * (order % 2 * 2 - 1) / count).reshape(site.weight_OI.shape)
        sites[path] = replace(site, weight_OI=weight)
    return sites


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    real = real_sites()
    inspect = inspector(
        META,
        budget_bytes=1 << 24,
        derive=lambda config, tensors, derived: write_derived(config, tensors, derived, real),
    )
    with Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as opened:
        yield opened


@pytest.fixture
def merges(store: Store) -> Iterator[Merges]:
    opened = Merges(store.root, META, NO_FRAME)
    yield opened
    opened.close()


def stored(store: Store, method: str, seed: int = 1) -> AdapterRecord:
    """A random adapter of a method, in the store."""
    found = methods()[method]
    config, tensors = found.example(sites_of(found, real_sites()), torch.Generator().manual_seed(seed))
    contents = json.dumps(config).encode(), save({name: each.contiguous() for name, each in tensors.items()})
    with store.begin_upload() as upload:
        digests = []
        for content in contents:
            with upload.begin_blob() as writer:
                writer.write(content)
                digests.append(writer.commit())
        return store.register(method, digests[0], digests[1], BASE)


def recipe_of(record: AdapterRecord, rank: int = 2) -> Recipe:
    return Recipe("svd", (Parent(record.digest, 0.5),), rank=rank)


async def merges_at_all(store: Store, merges: Merges, method: str) -> bool:
    """Whether one of several random adapters of a method does; options of some take it out."""
    for seed in range(1 if method in NOT_MERGED else 3):
        record = stored(store, method, seed)
        try:
            made = await merges.merge(recipe_of(record), [record])
        except AdapterMismatch as error:
            reason = str(error)
        else:
            return 0 <= made.relative_error < 1
        if f"({method}) " not in reason:
            pytest.fail(reason)
    return False


async def test_every_method_merges_or_is_refused_by_name(store: Store, merges: Merges) -> None:
    refused = [name for name in methods() if not await merges_at_all(store, merges, name)]
    assert refused == list(NOT_MERGED)


async def test_a_merge_is_written_to_the_byte_as_before(store: Store, merges: Merges) -> None:
    record = stored(store, "sora")
    first, second = [await merges.merge(recipe_of(record), [record]) for _ in range(2)]
    assert first == second
    assert first.recipe == recipe_of(record, rank=1)


async def test_more_merges_than_places_are_sent_away(store: Store, merges: Merges) -> None:
    record, may_go_on = stored(store, "sora"), threading.Event()
    merges._thread.submit(may_go_on.wait)
    waiting = [asyncio.create_task(merges.merge(recipe_of(record), [record])) for _ in range(MAX_OPEN)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="4 recipes"):
        await merges.merge(recipe_of(record), [record])
    may_go_on.set()
    assert len({made.tensors for made in await asyncio.gather(*waiting)}) == 1
    await merges.merge(recipe_of(record), [record])


async def test_what_waits_is_given_up_when_the_server_stops(store: Store, merges: Merges) -> None:
    record, may_go_on = stored(store, "sora"), threading.Event()
    merges._thread.submit(may_go_on.wait)
    waiting = asyncio.create_task(merges.merge(recipe_of(record), [record]))
    await asyncio.sleep(0)
    merges.close()
    may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(Draining):
        await merges.merge(recipe_of(record), [record])


def test_a_thread_that_gives_way_has_the_lowest_priority_and_others_keep_theirs() -> None:
    found: list[int] = []

    def work() -> None:
        give_way()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [LOWEST_PRIORITY]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LOWEST_PRIORITY


async def test_a_mixture_of_too_many_tensors_is_refused_before_a_parent_is_read(store: Store) -> None:
    record = replace(stored(store, "sora"), digest="sha256:" + "0" * 64)
    wide = replace(record, manifest=replace(record.manifest, sites=tuple(f"l{n}" for n in range(512))))
    opened = Merges(store.root, META, NO_FRAME)
    recipe = Recipe("arrow", (Parent(record.digest, 1.0),) * 5, top_k=1, temperature=1.0)
    with pytest.raises(InvalidRecipe, match="5 experts on 512 layers would be 5120 tensors, at most 4096"):
        await opened.merge(recipe, [wide] * 5)
    opened.close()


async def test_on_repeated_layers_nothing_is_computed(store: Store) -> None:
    record = stored(store, "sora")
    opened = Merges(store.root, META, replace(NO_FRAME, stack=(0, 0)))
    with pytest.raises(InvalidRecipe, match="on repeated layers"):
        await opened.merge(recipe_of(record), [record])
    opened.close()
