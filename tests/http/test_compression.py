"""Collections compressed together, over the real store."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
SHAPES = ((16, 16), (16, 24))
RANKS = {"one": 2, "two": 3, "three": 2}


def lora_tensors(rank: int, seed: int) -> dict[str, Tensor]:
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for path, (out_features, in_features) in zip(PATHS, SHAPES, strict=True):
        stem = f"base_model.model.{path}.lora"
        tensors[f"{stem}_A.weight"] = torch.randn(rank, in_features, generator=generator)
        tensors[f"{stem}_B.weight"] = torch.randn(out_features, rank, generator=generator)
    return tensors


@pytest.fixture
async def stocked(serve: Callable[..., Any], adapter_files: Any) -> Any:
    """Three LoRAs, an adapter without a low-rank form and a mix."""
    served = serve()
    files = type(adapter_files())
    uploads = {
        name: files(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}).encode(),
            save(lora_tensors(rank, seed)),
        )
        for seed, (name, rank) in enumerate(RANKS.items())
    }
    for name, each in {**uploads, "shira": adapter_files("shira")}.items():
        assert (await served.upload(each, name=(None, name))).status_code == 201
    mix = {"name": "mix", "kind": "linear", "parents": [{"name": "one", "weight": 0.5}]}
    assert (await served.client.post("/v1/recipes", json=mix)).status_code == 201
    return served


def body(*parents: str, **fields: Any) -> dict[str, Any]:
    members = [{"parent": parent, "name": f"{parent}-small"} for parent in parents]
    return {"kind": "joint_full", "rank": 4, "members": members, **fields}


@pytest.mark.parametrize("kind", ["joint_full", "joint_diagonal"])
async def test_each_member_is_an_adapter_that_says_what_it_costs_and_loses(stocked: Any, kind: str) -> None:
    response = await stocked.client.post("/v1/recipes/compress", json=body(*RANKS, kind=kind))
    assert response.status_code == 201, response.text
    answer = response.json()
    assert answer["basis_bytes"] == 4 * 4 * sum(map(sum, SHAPES))
    assert [member["id"] for member in answer["data"]] == [f"{name}-small@1" for name in RANKS]
    digests = [stocked.store.resolve(name).digest for name in RANKS]
    for member, parent, rank in zip(answer["data"], digests, RANKS.values(), strict=True):
        assert (member["method"], member["prepared_bytes"]) == ("lora_xs", 2 * 4 * 4 * 4)
        assert member["parent_prepared_bytes"] == 4 * rank * sum(map(sum, SHAPES))
        assert 0 < member["relative_error"] < 1
        assert member["recipe"] == {
            "kind": kind,
            "parents": [{"digest": digest, "weight": 1.0} for digest in digests],
            "rank": 4,
            "density": None,
            "seed": None,
            "member": parent,
        }
    again = await stocked.client.post("/v1/recipes/compress", json=body(*RANKS, kind=kind))
    assert again.json() == answer
    assert (await stocked.client.delete("/v1/adapters/two")).status_code == 200
    assert (await stocked.client.get("/v1/adapters/two-small")).json()["digest"] == answer["data"][1][
        "digest"
    ]
    assert [(kind, len(found)) for kind, found in stocked.recipes[1:]] == [(kind, 3)] * 2
    assert stocked.store.check_integrity() == ()


async def test_a_wide_basis_loses_nothing(stocked: Any) -> None:
    response = await stocked.client.post("/v1/recipes/compress", json=body(*RANKS, rank=7))
    assert max(member["relative_error"] for member in response.json()["data"]) < 1e-6


MANY = [{"parent": "one", "name": f"small-{number}"} for number in range(65)]
TWICE = [{"parent": parent, "name": "small"} for parent in ("one", "two")]
REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    (body("one", kind="svd"), 400, "kind", "joint_full"),
    (body(), 400, "members", "at least 1"),
    (body(members=MANY), 400, "members", "at most 64"),
    (body("one", rank=None), 400, "rank", "integer"),
    (body("one", rank=0), 400, "rank", "greater than or equal to 1"),
    (body("one", rank=17), 422, None, f"rank 17, but at {PATHS[0]} at most 16"),
    (body("one", "two", kind="reversible"), 422, None, "two@1 (lora) has rank 3 at"),
    (body("one", density=0.5), 400, "density", "not permitted"),
    (body("one", "parrot"), 404, "members.1.parent", "'parrot'"),
    (body("one", "one"), 400, "members.1.name", "given twice"),
    (body(members=TWICE), 400, "members.1.name", "'small' is given twice"),
    (body("one", members=[{"parent": "one", "name": "tiny"}]), 409, None, "base model's name"),
    (body("one", members=[{"parent": "one", "name": "a b"}]), 400, None, "'a b'"),
    (body("one", "tiny"), 404, "members.1.parent", "base model"),
    (body("one", "shira"), 422, None, "shira@1 (shira) has no low-rank form at"),
    (body("one", "mix"), 400, "members.1.parent", "mix@1 is a mix"),
    (body("one", "two", "three", members=[*body("one")["members"], {"parent": "two", "name": "prod"}]), 409,
     None, "alias"),
]  # fmt: skip


async def test_a_bad_collection_is_told_what_is_wrong_and_changes_nothing(stocked: Any) -> None:
    await stocked.client.put("/v1/adapters/two/alias", json={"alias": "prod"})
    before = stocked.stored_files()
    assert await stocked.not_refused_so("/v1/recipes/compress", REFUSED) == []
    assert stocked.stored_files() == before
    assert stocked.store.versions("one-small") == ()


async def test_a_pool_of_components_rebuilds_its_members(stocked: Any) -> None:
    made = await stocked.client.post(
        "/v1/recipes/compress", json=body("one", "three", kind="reversible", rank=1)
    )
    assert made.status_code == 201, made.text
    assert made.json()["basis_bytes"] == 4 * 2 * (1 + 1) * sum(map(sum, SHAPES))
    assert all(member["relative_error"] < 1e-3 for member in made.json()["data"])
