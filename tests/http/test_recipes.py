"""Adapters made of others, over the real store and the real merges."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from timbre_server.merging import Merges

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SHAPES = ((16, 16), (16, 24))
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OTHER_BASE = "sha256:" + "c" * 64


@pytest.fixture
async def stocked(serve: Callable[..., Any], adapter_files: Any, lora_files: Any) -> Any:
    """Two LoRAs of ranks 2 and 3, and adapters of other families."""
    served = serve()
    uploads = {"one": lora_files(2, 1), "two": lora_files(3, 2), "same": lora_files(2, 5)}
    uploads |= {name: adapter_files(name, seed=3) for name in ("fourierft", "ia3", "shira")}
    for name, each in uploads.items():
        response = await served.upload(each, name=(None, name))
        assert response.status_code == 201, response.text
    await served.client.put("/v1/adapters/two/alias", json={"alias": "prod"})
    return served


def body(kind: str, *names: str, **fields: Any) -> dict[str, Any]:
    parents = [
        {"name": name, "weight": weight} for name, weight in zip(names, (0.7, -0.4, 1.0), strict=False)
    ]
    return {"name": "made", "kind": kind, "parents": parents, **fields}


def deltas(served: Any, name: str) -> list[Tensor]:
    """ΔW of a stored LoRA at both layers, from its files."""
    manifest = served.store.resolve(name).manifest
    config = json.loads(served.store.blob_path(manifest.config_digest).read_bytes())
    tensors = load_file(served.store.blob_path(manifest.tensors_digest))
    scale = config["lora_alpha"] / config["r"]
    stems = [f"base_model.model.{path}.lora" for path in PATHS]
    return [scale * (tensors[f"{s}_B.weight"] @ tensors[f"{s}_A.weight"]).double() for s in stems]


async def test_a_merge_is_an_ordinary_adapter_that_says_how_it_was_made(stocked: Any) -> None:
    response = await stocked.client.post("/v1/recipes", json=body("svd", "one", "prod", rank=5))
    assert response.status_code == 201, response.text
    answer = response.json()
    one, two = (stocked.store.resolve(name) for name in ("one", "two"))
    parents = [{"digest": one.digest, "weight": 0.7}, {"digest": two.digest, "weight": -0.4}]
    assert answer["recipe"] == {
        "kind": "svd", "parents": parents, "rank": 5, "density": None, "seed": None, "member": None,
    }  # fmt: skip
    assert (answer["id"], answer["method"], answer["sites"]) == ("made@1", "lora", list(PATHS))
    assert answer["relative_error"] < 1e-6
    assert response.headers["location"] == "/v1/adapters/made@1"
    for found, first, second in zip(*(deltas(stocked, name) for name in ("made", "one", "two")), strict=True):
        torch.testing.assert_close(found, 0.7 * first - 0.4 * second, atol=1e-4, rtol=1e-4)
    listed = (await stocked.client.get("/v1/adapters")).json()["data"]
    recipes = {item["name"]: item["recipe"] for item in listed}
    assert recipes.pop("made") == answer["recipe"]
    assert set(recipes.values()) == {None}
    assert [(kind, [each.name for each in found]) for kind, found in stocked.recipes] == [("svd", ["made"])]
    assert stocked.store.check_integrity() == ()


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        ("ties", {"rank": 2, "density": 0.3}),
        ("magnitude_prune", {"density": 0.5}),
        ("dare_linear", {"rank": 4, "density": 0.5, "seed": 7}),
        ("dare_ties", {"density": 1}),
        ("lego", {"rank": 3, "seed": 2**63 - 1}),
        ("lego", {}),
        ("svd", {"rank": 1}),
    ],
    ids=str,
)
async def test_every_kind_makes_an_adapter_of_its_rank_and_the_same_again(
    stocked: Any, kind: str, numbers: dict[str, Any]
) -> None:
    first = await stocked.made(**body(kind, "one", "two", **numbers))
    rank = numbers.get("rank", 3)
    assert first["parameters"] == rank * sum(map(sum, SHAPES))
    assert first["recipe"]["rank"] == rank
    assert 0 < first["relative_error"] < 5
    assert await stocked.made(**body(kind, "one", "two", **numbers)) == first
    await stocked.client.delete("/v1/adapters/one")
    assert (await stocked.client.get("/v1/adapters/made")).json()["digest"] == first["digest"]


async def test_lorahub_takes_adapters_of_one_rank(stocked: Any) -> None:
    await stocked.made(**body("lorahub", "one", "same"))
    one, same = (
        load_file(stocked.store.blob_path(stocked.store.resolve(name).manifest.tensors_digest))
        for name in ("one", "same")
    )
    for path, found in zip(PATHS, deltas(stocked, "made"), strict=True):
        a, b = (
            0.7 * one[f"base_model.model.{path}.lora_{key}.weight"].double()
            - 0.4 * same[f"base_model.model.{path}.lora_{key}.weight"].double()
            for key in "AB"
        )
        torch.testing.assert_close(found, 2 * b @ a, atol=1e-4, rtol=1e-4)


async def test_another_seed_is_another_version_and_any_can_go(stocked: Any) -> None:
    answers = [
        await stocked.made(**body("dare_ties", "one", "two", density=0.4, seed=seed)) for seed in (1, 2)
    ]
    assert [answer["id"] for answer in answers] == ["made@1", "made@2"]
    assert (await stocked.client.delete("/v1/adapters/made@1")).status_code == 200
    assert (await stocked.client.get("/v1/adapters/made")).json()["versions"] == [
        {"version": 2, "digest": answers[1]["digest"]}
    ]
    assert (await stocked.client.delete("/v1/adapters/made")).json()["digests"] == [answers[1]["digest"]]


async def test_other_families_merge_where_their_change_stands_by_itself(stocked: Any) -> None:
    answer = await stocked.made(**body("ties", "fourierft", "shira", "one", rank=8, density=0.2))
    assert (answer["method"], answer["recipe"]["rank"]) == ("lora", 8)


async def test_a_mix_of_any_families_has_a_name_and_keeps_what_it_stands_on(stocked: Any) -> None:
    answer = await stocked.made(**body("linear", "one", "fourierft", "ia3"))
    assert (answer["method"], answer["relative_error"]) == ("mix", 0.0)
    assert [parent["weight"] for parent in answer["recipe"]["parents"]] == [0.7, -0.4, 1.0]
    parts = stocked.store.resolve("made").parts
    assert [part.adapter.name for part in parts] == ["one", "fourierft", "ia3"]
    refused = await stocked.client.delete("/v1/adapters/ia3")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "adapter_in_use")
    nested = await stocked.made(**{**body("linear", "made", "one"), "name": "nested"})
    weights = [parent["weight"] for parent in nested["recipe"]["parents"]]
    assert weights == pytest.approx([0.7 * 0.7 - 0.4, 0.7 * -0.4, 0.7])
    for name in ("nested", "made", "ia3"):
        assert (await stocked.client.delete(f"/v1/adapters/{name}")).status_code == 200


async def test_weights_that_multiply_through_named_mixes_stay_in_bounds(stocked: Any) -> None:
    strong = {"kind": "linear", "parents": [{"name": "one", "weight": 90}]}
    await stocked.made(**{**strong, "name": "loud"})
    before = stocked.stored_files()
    for weight in (1.2, -1.2):
        louder = {"name": "made", "kind": "linear", "parents": [{"name": "loud", "weight": weight}]}
        response = await stocked.client.post("/v1/recipes", json=louder)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "parents")
        assert "one@1 has the weight" in response.json()["error"]["message"]
    assert stocked.stored_files() == before
    assert stocked.store.versions("made") == ()
    await stocked.made(name="made", kind="linear", parents=[{"name": "loud", "weight": 1.1}])


async def test_a_taken_name_is_refused_before_anything_is_computed(
    stocked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    in_turn = Merges._in_turn

    async def noted(self: Merges, make: Any, recipe: Any, parents: Any) -> Any:
        started.append(recipe.kind)
        return await in_turn(self, make, recipe, parents)

    monkeypatch.setattr(Merges, "_in_turn", noted)

    async def statuses(name: str) -> list[int]:
        members = [{"parent": "one", "name": "small"}, {"parent": "two", "name": name}]
        together = {"kind": "joint_full", "rank": 2, "members": members}
        merged = await stocked.client.post("/v1/recipes", json=body("svd", "one", name=name))
        compressed = await stocked.client.post("/v1/recipes/compress", json=together)
        return [merged.status_code, compressed.status_code]

    for taken in ("prod", "tiny"):
        assert await statuses(taken) == [409, 409]
    assert started == []
    assert await statuses("free") == [201, 201]
    assert started == ["svd", "joint_full"]


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    (body("average", "one"), 400, "kind", "average"),
    (body("ties", density=0.5), 400, "parents", "at least 1"),
    (body("ties", "one", density=0.5, parents=[{"name": "one"}] * 9), 400, "parents", "at most 8"),
    (body("svd", "one", parents=[{"name": "one", "weight": 101}]), 400, "parents.0.weight", "101"),
    (body("svd", "one", parents=[{"name": "one", "weight": "1"}]), 400, "parents.0.weight", "number"),
    (body("ties", "one", density=0.5, parents=[{"nmae": "one"}]), 400, "parents.0.name", "required"),
    (body("ties", "one", density=0.5, extra=1), 400, "extra", "not permitted"),
    (body("ties", "one"), 400, "density", "density is required"),
    (body("ties", "one", density=0), 400, "density", "greater than 0"),
    (body("ties", "one", density=1.5), 400, "density", "less than or equal to 1"),
    (body("ties", "one", density=0.5, seed=1), 400, "seed", "means nothing to the kind 'ties'"),
    (body("linear", "one", rank=2), 400, "rank", "means nothing to the kind 'linear'"),
    (body("lorahub", "one", density=0.5), 400, "density", "means nothing to the kind 'lorahub'"),
    (body("svd", "one", rank=0), 400, "rank", "greater than or equal to 1"),
    (body("svd", "one", rank=4097), 400, "rank", "4096"),
    (body("svd", "one", rank=2.5), 400, "rank", "integer"),
    (body("lego", "one", seed=-1), 400, "seed", "greater than or equal to 0"),
    (body("svd", "one", rank=17), 422, None, f"rank is 17, but at {PATHS[0]} at most 16"),
    (body("lego", "one", "two", rank=6), 422, None, "rank is 6, but at"),
    (body("svd", "one", "parrot"), 404, "parents.1.name", "'parrot'"),
    (body("svd", "one", "two@2"), 404, "parents.1.name", "no version 2"),
    (body("svd", "tiny"), 404, "parents.0.name", "base model"),
    (body("svd", "one", "one@1"), 400, "parents.1.name", "one and the same adapter"),
    (body("svd", "two", "prod"), 400, "parents.1.name", "one and the same adapter"),
    (body("svd", "one", "stranger"), 409, "parents.1.name", "stranger@1 was made for the base model"),
    (body("svd", "one", "mix"), 400, "parents.1.name", "mix@1 is a mix"),
    (body("ties", "one", "ia3", rank=2, density=1), 422, None, "ia3@1 (ia3) at"),
    (body("lego", "one", "fourierft", rank=2), 422, None, "fourierft@1 (fourierft) has no low-rank form at"),
    (body("svd", "one", "shira"), 422, None, "rank is missing: shira@1 (shira)"),
    (body("lorahub", "one", "two"), 422, None, "one@1 has rank 2 and two@1 has rank 3"),
    (body("svd", "one", parents=[{"name": "one", "weight": 0}]), 422, None, "nothing is left of the"),
    (body("ties", "one", density=1e-9), 422, None, "nothing is left of the"),
    (body("linear", "one", parents=[{"name": "one", "weight": 0}]), 400, "parents", "every weight is 0"),
    (body("svd", "one", name="tiny"), 409, None, "base model's name"),
    (body("svd", "one", name="prod"), 409, None, "alias"),
    (body("linear", "one", name="prod"), 409, None, "alias"),
    (body("svd", "one", name="no name"), 400, None, "'no name'"),
]  # fmt: skip


async def test_a_bad_recipe_is_told_what_is_wrong_and_changes_nothing(stocked: Any) -> None:
    record = stocked.store.resolve("one")
    digests = record.manifest.config_digest, record.manifest.tensors_digest
    stocked.store.register("stranger", *digests, OTHER_BASE)
    await stocked.made(**{**body("linear", "two"), "name": "mix"})
    before = stocked.stored_files()
    assert await stocked.not_refused_so("/v1/recipes", REFUSED) == []
    assert stocked.stored_files() == before
    assert stocked.store.versions("made") == ()
    assert {len(found) for _, found in stocked.recipes[1:]} == {0}


async def test_a_weight_that_is_no_number_is_refused(stocked: Any) -> None:
    headers = {"Content-Type": "application/json"}
    for weight in ("NaN", "Infinity", "-Infinity", "1e999"):
        text = json.dumps(body("svd", "one")).replace("0.7", weight)
        response = await stocked.client.post("/v1/recipes", content=text, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value"), weight
    assert stocked.store.versions("made") == ()


async def test_values_that_overflow_are_refused_and_leave_nothing(stocked: Any, lora_files: Any) -> None:
    large = lora_files(2, 9)
    tensors = {name: 1e37 * tensor for name, tensor in load(large.tensors).items()}
    response = await stocked.upload(type(large)(large.config, save(tensors)), name=(None, "large"))
    assert response.status_code == 201, response.text
    before = stocked.stored_files()
    parents = [{"name": "large", "weight": 100}, {"name": "one"}]
    for kind, numbers in (("ties", {"rank": 2, "density": 0.5}), ("svd", {}), ("lorahub", {}), ("lego", {})):
        recipe = {"name": "made", "kind": kind, "parents": parents, **numbers}
        response = await stocked.client.post("/v1/recipes", json=recipe)
        assert (response.status_code, response.json()["error"]["code"]) == (422, "recipe_invalid"), kind
        assert f"at {PATHS[0]} the adapters' values multiply" in response.json()["error"]["message"]
    assert stocked.stored_files() == before
