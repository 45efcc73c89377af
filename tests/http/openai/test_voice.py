"""Which adapter answers: names, versions, digests, and what the answer says of them."""

from __future__ import annotations

from typing import Any

import pytest

PATH = "/v1/completions"


@pytest.fixture
def shelved(rig: Any) -> Any:
    rig.shelf.add("pirate", 1)
    rig.shelf.add("pirate", 2)
    rig.shelf.add("poet", 1, base=None)
    rig.shelf.add("stranger", 1, base="sha256:" + "c" * 64)
    return rig


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({"model": "pirate"}, 2),
        ({"model": "pirate@1"}, 1),
        ({"model": "pirate@sha256:" + "0" * 64}, 1),
        ({"model": "tiny-base:pirate"}, 2),
        ({"model": "org/tiny-base:pirate@sha256:" + "0" * 64}, 1),
        ({"model": "tiny-base", "adapter_id": "pirate@1"}, 1),
        ({"model": "pirate@2", "adapter_id": "pirate"}, 2),
        ({"model": None, "adapter_id": "pirate"}, 2),
    ],
    ids=str,
)
async def test_every_way_to_name_an_adapter_leads_to_its_digest(
    shelved: Any, fields: dict[str, Any], version: int
) -> None:
    response = await shelved.post(PATH, prompt="x", **fields)
    record = shelved.shelf.records[version - 1]
    assert response.status_code == 200
    assert [use.digest for use in shelved.engine.submitted[0].adapters] == [record.digest]
    assert response.json()["adapter"] == {"name": "pirate", "version": version, "digest": record.digest}
    assert response.json()["model"] == (fields["model"] or fields["adapter_id"])
    assert response.headers["x-timbre-adapter"] == f"pirate@{version}"
    assert response.headers["x-timbre-adapter-digest"] == record.digest


@pytest.mark.parametrize("model", ["tiny-base", "org/tiny-base"])
async def test_the_base_answers_by_its_names_alone(shelved: Any, model: str) -> None:
    response = await shelved.post(PATH, model=model, prompt="x")
    assert shelved.engine.submitted[0].adapters == ()
    assert response.json()["adapter"] is None
    assert "x-timbre-adapter" not in response.headers


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
@pytest.mark.parametrize(
    "name",
    ["parrot", "pirate@3", "pirate@sha256:" + "9" * 64, "../../etc/passwd", "tiny-base:", "a b", "\x00"],
)
async def test_an_unknown_adapter_is_never_answered_by_the_base(shelved: Any, path: str, name: str) -> None:
    for fields in ({"model": name}, {"adapter_id": name}):
        status, error = await shelved.refused(path, **fields)
        assert (status, error["code"], error["type"]) == (404, "model_not_found", "not_found_error")
    assert shelved.engine.submitted == []


async def test_an_adapter_of_another_base_is_refused_and_not_retried(shelved: Any) -> None:
    response = await shelved.post(PATH, model="stranger", prompt="x")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "base_model_mismatch"
    assert response.headers["x-should-retry"] == "false"


async def test_an_adapter_stored_without_a_base_is_served(shelved: Any) -> None:
    assert (await shelved.complete(model="poet"))["adapter"]["name"] == "poet"


async def test_two_different_adapters_in_one_request_contradict_each_other(shelved: Any) -> None:
    status, error = await shelved.refused(PATH, model="pirate@1", adapter_id="pirate@2")
    assert (status, error["param"]) == (400, "adapter_id")


async def test_adapter_id_cannot_mean_the_base_and_a_model_must_be_named(shelved: Any) -> None:
    assert (await shelved.refused(PATH, adapter_id="tiny-base"))[0] == 404
    status, error = await shelved.refused(PATH, model=None)
    assert (status, error["param"]) == (400, "model")
    assert "'tiny-base'" in error["message"]


async def test_the_first_event_of_a_stream_says_who_answers(shelved: Any) -> None:
    events = await shelved.stream(PATH, model="pirate")
    assert events[0]["adapter"]["version"] == 2
    assert all("adapter" not in event for event in events[1:])


@pytest.fixture
def aliased(shelved: Any) -> Any:
    shelved.shelf.aliases |= {"old": "pirate@1", "quill": "poet"}
    return shelved


async def test_models_lists_bases_first_and_then_the_latest_of_each_adapter(shelved: Any) -> None:
    body = (await shelved.get("/v1/models")).json()
    assert body["object"] == "list"
    assert body["has_more"] is False
    assert [entry["id"] for entry in body["data"]] == [
        "tiny-base", "org/tiny-base", "pirate", "poet", "stranger",
    ]  # fmt: skip
    base, _, pirate, *_ = body["data"]
    assert (base["parent"], base["root"], base["created"]) == (None, "tiny-base", 1_700_000_000)
    assert pirate["parent"] == "tiny-base"
    assert pirate["root"] == "pirate@" + shelved.shelf.records[1].digest
    assert pirate["max_model_len"] == 512
    assert pirate["object"] == "model"
    assert pirate["adapter"]["version"] == 2


async def test_models_lists_an_alias_as_the_adapter_that_it_leads_to(aliased: Any) -> None:
    body = (await aliased.get("/v1/models")).json()
    cards = {entry["id"]: entry for entry in body["data"]}
    first = aliased.shelf.records[0]
    identity = {"name": "pirate", "version": 1, "digest": first.digest}
    assert cards["old"]["adapter"] == {**identity, "method": "lora"}
    assert cards["old"]["root"] == f"pirate@{first.digest}"
    assert cards["old"]["parent"] == "tiny-base"
    assert cards["quill"] == {**cards["poet"], "id": "quill"}
    for alias in ("old", "quill"):
        assert (await aliased.get(f"/v1/models/{alias}")).json() == cards[alias]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 6, 7, 8])
async def test_pages_of_any_size_add_up_to_the_list(aliased: Any, limit: int) -> None:
    seen: list[str] = []
    query = f"limit={limit}"
    for _ in range(8):
        body = (await aliased.get(f"/v1/models?{query}")).json()
        assert len(body["data"]) <= limit
        seen += [entry["id"] for entry in body["data"]]
        if not body["has_more"]:
            break
        assert body["last_id"] == seen[-1]
        query = f"limit={limit}&after={body['last_id']}"
    assert seen == ["tiny-base", "org/tiny-base", "old", "pirate", "poet", "quill", "stranger"]


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "after=" + "x" * 257])
async def test_pages_out_of_bounds_are_refused(rig: Any, query: str) -> None:
    response = await rig.get(f"/v1/models?{query}")
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


async def test_one_model_is_found_by_any_reference(shelved: Any) -> None:
    assert (await shelved.get("/v1/models/org/tiny-base")).json()["id"] == "org/tiny-base"
    response = await shelved.get("/v1/models/pirate@1")
    assert response.json()["id"] == "pirate@1"
    assert response.headers["x-timbre-adapter"] == "pirate@1"
    missing = await shelved.get("/v1/models/parrot")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
