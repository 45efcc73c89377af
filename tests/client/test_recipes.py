"""Recipes by both clients, against the real routes and merges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from timbre_client import (
    AsyncTimbre,
    Completion,
    Conflict,
    InvalidRequest,
    NotFound,
    RecipeParent,
    Timbre,
)

STEM = "base_model.model.model.layers.0.q_proj"


@pytest.fixture
def stocked(client: Timbre, tmp_path: Path) -> Timbre:
    """A server with three small LoRAs."""
    for seed, name in enumerate(("one", "two", "three")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
        draw = np.random.default_rng(seed)
        factors = {
            f"{STEM}.lora_A.weight": draw.normal(size=(2, 8)).astype(np.float32),
            f"{STEM}.lora_B.weight": draw.normal(size=(8, 2)).astype(np.float32),
        }
        save_file(factors, folder / "adapter_model.safetensors")
        client.upload_adapter(name, folder)
    return client


def test_a_merge_comes_back_with_its_recipe_and_its_error(stocked: Timbre) -> None:
    made = stocked.create_recipe("made", "dare_ties", {"one": 0.7, "two": -0.3}, rank=2, density=0.5, seed=7)
    assert (made.adapter.id, made.adapter.method) == ("made@1", "lora")
    assert 0 < made.relative_error < 1
    recipe = made.adapter.recipe
    assert recipe is not None
    assert (recipe.kind, recipe.rank, recipe.density, recipe.seed) == ("dare_ties", 2, 0.5, 7)
    one, two = (stocked.get_adapter(name) for name in ("one", "two"))
    assert recipe.parents == (RecipeParent(one.digest, 0.7), RecipeParent(two.digest, -0.3))
    assert one.recipe is None
    assert stocked.get_adapter("made").recipe == recipe


def test_what_is_wrong_with_a_recipe_is_raised(stocked: Timbre) -> None:
    with pytest.raises(NotFound, match="parrot"):
        stocked.create_recipe("made", "svd", {"parrot": 1})
    with pytest.raises(InvalidRequest, match="density is required"):
        stocked.create_recipe("made", "ties", {"one": 1})
    with pytest.raises(InvalidRequest, match="rank is 9, but at model") as caught:
        stocked.create_recipe("made", "svd", {"one": 1}, rank=9)
    assert caught.value.code == "recipe_invalid"
    stocked.create_recipe("mix", "linear", {"one": 0.5})
    with pytest.raises(Conflict, match="mix@1"):
        stocked.delete_adapter("one")


async def test_a_collection_is_one_basis_and_its_members(stocked: Timbre, url: str) -> None:
    found = stocked.compress_adapters({"one": "small-one", "two": "small-two"}, rank=3)
    assert [member.adapter.id for member in found.members] == ["small-one@1", "small-two@1"]
    assert found.basis_bytes == 4 * 3 * 16
    assert all(0 < member.relative_error < 1 for member in found.members)
    async with AsyncTimbre(url) as client:
        again = await client.compress_adapters({"one": "small-one", "two": "small-two"}, rank=3)
        assert again == found
        made = await client.create_recipe("hub", "lorahub", {"one": 0.5, "two": 0.5})
    assert made.adapter.recipe is not None
    assert made.adapter.recipe.kind == "lorahub"


async def test_adapters_are_bound_by_a_router_s_file(stocked: Timbre, url: str, tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    save_file({"router.weight": np.ones((2, 8), np.float32)}, path)
    parents = {"one": 1.0, "two": 0.5}
    digest = stocked.upload_file(path)
    made = stocked.create_recipe("both", "routed", parents, router=digest, top_k=1, renormalised=False)
    recipe = made.adapter.recipe
    assert recipe is not None
    assert (recipe.router, recipe.top_k, recipe.renormalised) == (digest, 1, False)
    assert [parent.weight for parent in recipe.parents] == [1.0, 0.5]
    async with AsyncTimbre(url) as client:
        assert await client.upload_file(path) == digest
        again = await client.create_recipe("near", "arrow", parents, temperature=0.5, general=["three"])
    assert again.adapter.recipe is not None
    assert again.adapter.recipe.temperature == 0.5
    assert again.adapter.recipe.general == (stocked.get_adapter("three").digest,)


def test_a_named_mix_is_stamped_with_its_own_name_and_with_its_parts() -> None:
    part = {"name": "one", "version": 2, "digest": "sha256:" + "1" * 64, "weight": 0.5}
    stamp = {"name": "mix", "version": 1, "digest": "sha256:" + "2" * 64, "mix": [part]}
    answer = Completion.of({"id": "cmpl-1", "model": "mix", "choices": [], "usage": None, "adapter": stamp})
    assert answer.adapter is not None
    assert (answer.adapter.name, answer.adapter.digest[-1]) == ("mix", "2")
    assert [(each.name, each.weight) for each in answer.mix] == [("one", 0.5)]
