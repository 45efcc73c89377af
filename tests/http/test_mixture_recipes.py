"""Stored LoRAs bound into one mixture of experts, over the real store and the real merges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
WIDTHS = (16, 24)


@pytest.fixture
async def stocked(serve: Callable[..., Any], adapter_files: Any, lora_files: Any) -> Any:
    """LoRAs of ranks 2, 3 and 2, and one without a low-rank form."""
    served = serve()
    uploads = {"one": lora_files(2, 1), "two": lora_files(3, 2), "wiki": lora_files(2, 3)}
    for name, each in {**uploads, "shira": adapter_files("shira")}.items():
        response = await served.upload(each, name=(None, name))
        assert response.status_code == 201, response.text
    mix = {"name": "mix", "kind": "linear", "parents": [{"name": "one", "weight": 0.5}]}
    assert (await served.client.post("/v1/recipes", json=mix)).status_code == 201
    return served


def router(num_experts: int = 2, **changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        f"{path}.router.weight": torch.randn(num_experts, width, generator=generator)
        for path, width in zip(PATHS, WIDTHS, strict=True)
    }
    return tensors | {name.replace("__", "."): tensor for name, tensor in changes.items()}


async def sent(served: Any, content: bytes | dict[str, Tensor]) -> str:
    """The digest of a file that is now in the store."""
    data = content if isinstance(content, bytes) else save(content)
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    response = await served.client.put(f"/v1/blobs/{digest}", content=data)
    assert response.status_code in (200, 201), response.text
    return digest


def body(kind: str, *names: str, **fields: Any) -> dict[str, Any]:
    return {"name": "made", "kind": kind, "parents": [{"name": name} for name in names], **fields}


def files_of(served: Any, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    manifest = served.store.resolve(name).manifest
    config = json.loads(served.store.blob_path(manifest.config_digest).read_bytes())
    return config, load_file(served.store.blob_path(manifest.tensors_digest))


def recipe_parents(served: Any, *names: str) -> list[dict[str, Any]]:
    return [{"digest": served.store.resolve(name).digest, "weight": 1.0} for name in names]


async def test_arrow_binds_stored_adapters_and_says_which(stocked: Any) -> None:
    parents = [{"name": "one", "weight": 1.5}, {"name": "two"}]
    answer = await stocked.made(name="made", kind="arrow", parents=parents, top_k=1, temperature=0.5)
    assert (answer["method"], answer["sites"], answer["relative_error"]) == ("arrow", list(PATHS), 0.0)
    one, two = recipe_parents(stocked, "one", "two")
    assert answer["recipe"] == {
        "kind": "arrow", "parents": [{**one, "weight": 1.5}, two], "rank": None, "density": None,
        "seed": None, "member": None, "top_k": 1, "temperature": 0.5,
    }  # fmt: skip
    config, tensors = files_of(stocked, "made")
    assert (config["scales"], config["top_k"], config["router_temperature"]) == ([1.5, 1.0], 1, 0.5)
    _, parent = files_of(stocked, "two")
    stem = f"base_model.model.{PATHS[1]}"
    assert torch.equal(tensors[f"{stem}.experts.1.lora_A.weight"], parent[f"{stem}.lora_A.weight"])
    assert torch.equal(tensors[f"{stem}.experts.1.lora_B.weight"], 2 * parent[f"{stem}.lora_B.weight"])
    assert stocked.store.resolve("made").manifest.derived_digest is not None
    assert await stocked.made(name="made", kind="arrow", parents=parents, top_k=1, temperature=0.5) == answer
    for name in ("mix", "one", "two"):
        assert (await stocked.client.delete(f"/v1/adapters/{name}")).status_code == 200
    stocked.store.collect_garbage(0)
    assert (await stocked.client.get("/v1/adapters/made")).json()["recipe"] == answer["recipe"]
    assert stocked.store.check_integrity() == ()


async def test_general_adapters_are_taken_from_the_others(stocked: Any) -> None:
    answer = await stocked.made(**body("arrow", "one", general=["wiki"]))
    assert answer["recipe"]["general"] == [stocked.store.resolve("wiki").digest]
    assert (answer["recipe"]["top_k"], answer["recipe"]["temperature"]) == (1, 1.0)
    (_, tensors), (_, one), (_, wiki) = (files_of(stocked, name) for name in ("made", "one", "wiki"))
    for path in PATHS:
        stem = f"base_model.model.{path}"
        for side, scale in (("A", 1), ("B", 2)):
            key = f"lora_{side}.weight"
            expected = scale * (one[f"{stem}.{key}"] - wiki[f"{stem}.{key}"])
            torch.testing.assert_close(tensors[f"{stem}.experts.0.{key}"], expected)


async def test_a_router_of_the_users_own_binds_them(stocked: Any) -> None:
    given = router() | {f"{PATHS[0]}.router.bias": torch.tensor([0.5, -0.5])}
    digest = await sent(stocked, given)
    answer = await stocked.made(**body("routed", "one", "two", router=digest, top_k=1, renormalised=False))
    assert (answer["method"], answer["relative_error"]) == ("lora_mixer", 0.0)
    said = {key: answer["recipe"][key] for key in ("parents", "router", "top_k", "renormalised")}
    parents = recipe_parents(stocked, "one", "two")
    assert said == {"parents": parents, "router": digest, "top_k": 1, "renormalised": False}
    config, tensors = files_of(stocked, "made")
    assert (config["top_k"], config["renormalised"], config["router_bias"]) == (1, False, True)
    for name, tensor in given.items():
        assert torch.equal(tensors[f"base_model.model.{name}"], tensor)
    assert torch.equal(tensors[f"base_model.model.{PATHS[1]}.router.bias"], torch.zeros(2))
    stocked.store.collect_garbage(0)
    assert not stocked.store.has_blob(digest)
    assert (await stocked.client.get("/v1/adapters/made")).json()["digest"] == answer["digest"]
    everyone = body("routed", "one", "two", router=await sent(stocked, router()))
    answer = await stocked.made(**{**everyone, "name": "all"})
    assert (answer["recipe"]["top_k"], answer["recipe"]["renormalised"]) == (2, True)


ABSENT = "sha256:" + "e" * 64
REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    (body("arrow"), 400, "parents", "at least 1"),
    (body("arrow", *["one"] * 65), 400, "parents", "at most 64"),
    (body("arrow", "one", "two", top_k=3), 400, "top_k", "top_k is 3; expected at most 2, the number"),
    (body("arrow", "one", top_k=0), 400, "top_k", "greater than or equal to 1"),
    (body("arrow", "one", temperature=0), 400, "temperature", "greater than or equal to"),
    (body("arrow", "one", rank=2), 400, "rank", "rank means nothing to the kind 'arrow'"),
    (body("arrow", "one", router=ABSENT), 400, "router", "router means nothing to the kind 'arrow'"),
    (body("svd", "one", top_k=1), 400, "top_k", "top_k means nothing to the kind 'svd'"),
    (body("arrow", "one", general=[]), 400, "general", "at least 1"),
    (body("arrow", "one", general=["parrot"]), 404, "general.0", "'parrot'"),
    (body("arrow", "one", general=["wiki", "mix"]), 400, "general.1", "mix@1 is a mix"),
    (body("arrow", "one", general=["wiki", "wiki@1"]), 400, "general.1", "one and the same"),
    (body("arrow", "one", general=["two"]), 422, None, "one@1 has rank 2 and two@1 has rank 3"),
    (body("arrow", "one", "parrot"), 404, "parents.1.name", "'parrot'"),
    (body("arrow", "one", "mix"), 400, "parents.1.name", "mix@1 is a mix"),
    (body("arrow", "one", "one@1"), 400, "parents.1.name", "one and the same adapter"),
    (body("arrow", "one", "shira"), 422, None, "shira@1 (shira) has no low-rank form at"),
    (body("arrow", "one", name="tiny"), 409, None, "base model's name"),
    (body("routed", "one"), 400, "router", "expected sha256:<64 hex digits>"),
    (body("routed", "one", router="router.safetensors"), 400, "router", "expected sha256:<64 hex digits>"),
    (body("routed", "one", router=ABSENT), 400, "router", f"no file {ABSENT} is here"),
    (body("routed", "one", router=ABSENT, temperature=2), 400, "temperature", "means nothing to the kind"),
]  # fmt: skip

FILES: list[tuple[bytes | dict[str, Tensor], str]] = [
    (b"router", "safetensors"),
    (router(3), f"{PATHS[0]}.router.weight: found shape [3, 16], expected [2, 16]"),
    (router(elsewhere__router__weight=torch.ones(2, 16)), "elsewhere.router.weight, but this base has no"),
    (router(router__kernel=torch.ones(2, 16)), "'router.kernel'; expected 'router.weight'"),
    ({f"{PATHS[0]}.router.weight": torch.ones(2, 16)}, f"no router for {PATHS[1]}"),
    (router(router__weight=torch.tensor([[float("nan")] * 16] * 2)), "'router.weight' holds NaN or infinity"),
]


async def test_a_bad_mixture_is_told_what_is_wrong_and_changes_nothing(stocked: Any) -> None:
    digests = [await sent(stocked, content) for content, _ in FILES]
    of_files = [
        (body("routed", "one", "two", router=digest), 422, None, words)
        for digest, (_, words) in zip(digests, FILES, strict=True)
    ]
    before = stocked.stored_files()
    assert await stocked.not_refused_so("/v1/recipes", (*REFUSED, *of_files)) == []
    assert stocked.stored_files() == before
    assert stocked.store.versions("made") == ()
