"""Uploading, listing, naming and deleting adapters, with the real store and hostile clients."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
from safetensors.torch import load

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


async def test_an_upload_is_answered_with_what_the_adapter_is(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    files = adapter_files()
    served = serve()
    response = await served.upload(files)
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["name"], body["version"], body["method"], body["peft_type"]) == ("pirate", 1, "lora", "LORA")
    assert set(body["sites"]) <= {site.path for site in served.engine.info.sites}
    assert body["base_model_digest"] == served.engine.info.model_digest
    assert body["stored_bytes"] == len(files.config) + len(files.tensors)
    assert body["parameters"] == sum(tensor.numel() for tensor in load(files.tensors).values())
    assert body["prepared_bytes"] > 0
    assert body["files"] == {CONFIG: digest_of(files.config), TENSORS: digest_of(files.tensors)}
    assert response.headers["location"] == "/v1/adapters/pirate@1"
    assert [record.digest for record in served.uploads] == [body["digest"]]
    assert served.answered == [("/v1/adapters", 201)]
    assert (await served.client.get("/v1/adapters/pirate")).json()["digest"] == body["digest"]


@pytest.mark.parametrize("method", ["lora", "fourierft", "shira", "ia3"])
async def test_every_method_can_be_uploaded(
    serve: Callable[..., Any], adapter_files: Any, method: str
) -> None:
    response = await serve().upload(adapter_files(method))
    assert (response.status_code, response.json()["method"]) == (201, method)


async def test_new_bytes_are_a_new_version_and_the_same_bytes_are_not(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    versions = [(await served.upload(adapter_files(seed=seed))).json()["version"] for seed in (0, 1, 1)]
    assert versions == [1, 2, 2]
    first = (await served.client.get("/v1/adapters/pirate@1")).json()
    assert [item["version"] for item in first["versions"]] == [1, 2]
    assert (await served.client.get(f"/v1/adapters/pirate@{first['digest']}")).json()["version"] == 1


async def test_blobs_and_then_json_make_the_same_adapter_as_a_form(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served, files = serve(), adapter_files()
    digests = {CONFIG: digest_of(files.config), TENSORS: digest_of(files.tensors)}
    for content, digest in ((files.config, digests[CONFIG]), (files.tensors, digests[TENSORS])):
        assert (await served.client.head(f"/v1/blobs/{digest}")).status_code == 404
        assert (await served.client.put(f"/v1/blobs/{digest}", content=content)).status_code == 201
        assert (await served.client.head(f"/v1/blobs/{digest}")).status_code == 200
        assert (await served.client.put(f"/v1/blobs/{digest}", content=content)).status_code == 200
    by_digest = await served.client.post("/v1/adapters", json={"name": "pirate", "files": digests})
    assert by_digest.status_code == 201, by_digest.text
    assert (await served.upload(files, name=(None, "other"))).json()["digest"] == by_digest.json()["digest"]


async def test_the_list_pages_in_order_of_names(serve: Callable[..., Any], adapter_files: Any) -> None:
    served, files = serve(), adapter_files()
    for name in ("c", "a", "b"):
        await served.upload(files, name=(None, name))
    first = (await served.client.get("/v1/adapters?limit=2")).json()
    assert ([item["name"] for item in first["data"]], first["has_more"]) == (["a", "b"], True)
    rest = (await served.client.get(f"/v1/adapters?limit=2&after={first['last_id']}")).json()
    assert ([item["name"] for item in rest["data"]], rest["has_more"]) == (["c"], False)


@pytest.mark.parametrize(
    ("kind", "text", "status"),
    [("text/plain", '{"alias": "prod"}', 415), ("application/json", '{"alias": "\\ud800"}', 400)],
)
async def test_an_alias_that_is_not_json_is_refused(
    serve: Callable[..., Any], adapter_files: Any, kind: str, text: str, status: int
) -> None:
    served = serve()
    await served.upload(adapter_files())
    response = await served.client.put(
        "/v1/adapters/pirate/alias", content=text, headers={"Content-Type": kind}
    )
    assert response.status_code == status, response.text
    assert served.store.aliases() == ()


async def test_an_alias_leads_to_an_adapter_and_can_be_moved(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    for seed in (0, 1):
        await served.upload(adapter_files(seed=seed))
    moves = []
    for target in ("pirate@1", "pirate"):
        response = await served.client.put(f"/v1/adapters/{target}/alias", json={"alias": "prod"})
        assert response.status_code == 200, response.text
        moves.append((await served.client.get("/v1/adapters/prod")).json()["version"])
    assert moves == [1, 2]
    assert (await served.client.get("/v1/adapters/pirate")).json()["aliases"] == [
        {"alias": "prod", "target": "pirate"}
    ]


async def test_a_deleted_name_is_gone_at_once_and_its_memory_when_nobody_uses_it(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    digest = (await served.upload(adapter_files())).json()["digest"]
    served.engine.may_unload.clear()
    response = await served.client.delete("/v1/adapters/pirate")
    assert response.json() == {"id": "pirate", "object": "adapter", "deleted": True, "digests": [digest]}
    assert (await served.client.get("/v1/adapters/pirate")).status_code == 404
    assert served.engine.unloaded == []
    served.engine.may_unload.set()
    await asyncio.wait_for(settle(served.engine, [digest]), 5)


async def settle(engine: Any, expected: list[str]) -> None:
    while engine.unloaded != expected:
        await asyncio.sleep(0)


async def test_a_delete_that_waits_is_answered_when_the_memory_is_free(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    digest = (await served.upload(adapter_files())).json()["digest"]
    await served.client.delete("/v1/adapters/pirate?wait=true")
    assert served.engine.unloaded == [digest]


async def test_an_adapter_with_another_name_left_stays_in_memory(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    for name in ("one", "two"):
        await served.upload(adapter_files(), name=(None, name))
    assert (await served.client.delete("/v1/adapters/one?wait=true")).json()["digests"] == []
    assert served.engine.unloaded == []


@pytest.mark.parametrize(
    "path", ["/v1/adapters/nobody", "/v1/adapters/nobody@1", "/v1/adapters/..%2f..%2fetc"]
)
async def test_an_unknown_adapter_is_not_found(serve: Callable[..., Any], path: str) -> None:
    served = serve()
    for method in ("GET", "DELETE"):
        assert (await served.client.request(method, path)).status_code == 404


async def test_two_uploads_of_one_name_at_once_get_two_versions(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    answers = await asyncio.gather(*(served.upload(adapter_files(seed=seed)) for seed in range(6)))
    assert sorted(answer.json()["version"] for answer in answers) == [1, 2, 3, 4, 5, 6]
    assert served.store.check_integrity() == ()


async def test_an_adapter_that_an_alias_needs_is_in_use(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    await served.upload(adapter_files())
    await served.client.put("/v1/adapters/pirate/alias", json={"alias": "prod"})
    response = await served.client.delete("/v1/adapters/pirate")
    assert (response.status_code, response.json()["error"]["code"]) == (409, "adapter_in_use")
    assert response.headers["x-should-retry"] == "false"
