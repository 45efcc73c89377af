"""Several adapters with weights in one request: what the engine is told, who is named, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from timbre_methods import routing
from timbre_server.engine.messages import TokenEvent
from timbre_server.http import mixes
from timbre_store.records import MixPart

PATH = "/v1/completions"
PATHS = [PATH, "/v1/chat/completions"]
BUDGET = 100


def manifest_with(rig: Any, index: int, **fields: Any) -> None:
    record = rig.shelf.records[index]
    rig.shelf.records[index] = replace(record, manifest=replace(record.manifest, **fields))


@pytest.fixture
def shelved(rig: Any) -> Any:
    """Ten adapters of one byte each, and room for a hundred bytes."""
    rig.engine.info = msgspec.structs.replace(rig.engine.info, adapter_budget_bytes=BUDGET)
    rig.shelf.add("pirate", 1)
    rig.shelf.add("pirate", 2)
    rig.shelf.add("json")
    rig.shelf.add("stranger", base="sha256:" + "c" * 64)
    for number in range(6):
        rig.shelf.add(f"extra-{number}")
    return rig


def digest(rig: Any, index: int) -> str:
    return str(rig.shelf.records[index].digest)


TWO = [{"name": "pirate@1", "weight": 0.7}, {"name": "json", "weight": -0.3}]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": TWO},
        {"adapters": TWO, "merged_adapters": None, "lora": []},
        {"merged_adapters": {"ids": ["pirate@1", "json"], "weights": [0.7, -0.3], "density": 0.5}},
        {"lora": [{"id": "pirate@1", "scale": 0.7}, {"id": "tiny-base:json", "scale": -0.3}]},
    ],
    ids=str,
)
async def test_every_spelling_leads_to_the_same_digests_and_weights(
    shelved: Any, path: str, fields: dict[str, Any]
) -> None:
    default: dict[str, Any] = {"prompt": "hi"}
    if "chat" in path:
        default = {"messages": [{"role": "user", "content": "hi"}]}
    response = await shelved.post(path, **default, **fields)
    assert response.status_code == 200, response.text
    (submitted,) = shelved.engine.submitted
    pirate, json = digest(shelved, 0), digest(shelved, 2)
    assert [(use.digest, use.weight) for use in submitted.adapters] == [(pirate, 0.7), (json, -0.3)]
    assert response.json()["model"] == "tiny-base"
    assert response.json()["adapter"] == {
        "mix": [
            {"name": "pirate", "version": 1, "digest": pirate, "weight": 0.7},
            {"name": "json", "version": 1, "digest": json, "weight": -0.3},
        ]
    }
    assert response.headers["x-timbre-adapter"] == "pirate@1;weight=0.7, json@1;weight=-0.3"
    assert response.headers["x-timbre-adapter-digest"] == f"{pirate}, {json}"
    assert "x-ignored-fields" not in response.headers


async def test_the_first_event_of_a_stream_names_the_mix(shelved: Any) -> None:
    events = await shelved.stream(PATH, adapters=TWO)
    assert [each["weight"] for each in events[0]["adapter"]["mix"]] == [0.7, -0.3]
    assert all("adapter" not in event for event in events[1:])


@pytest.mark.parametrize(
    "fields",
    [
        {"adapters": [{"name": "pirate"}]},
        {"adapters": [{"name": "json", "weight": 0}, {"name": "pirate@2", "weight": 1}]},
        {"merged_adapters": {"ids": ["pirate"]}},
        {"lora": [{"id": "pirate", "scale": 1}]},
    ],
    ids=str,
)
async def test_one_adapter_of_weight_1_answers_as_if_named_alone(shelved: Any, fields: Any) -> None:
    mixed = await shelved.post(PATH, model="tiny-base", prompt="x", **fields)
    alone = await shelved.post(PATH, model="tiny-base", adapter_id="pirate", prompt="x")
    assert mixed.json()["adapter"] == alone.json()["adapter"]
    names = ("x-timbre-adapter", "x-timbre-adapter-digest")
    assert [mixed.headers[name] for name in names] == [alone.headers[name] for name in names]
    one, other = shelved.engine.submitted
    assert one.adapters == other.adapters


async def test_one_adapter_with_a_weight_is_a_mix_that_says_so(shelved: Any) -> None:
    answer = await shelved.complete(adapters=[{"name": "json", "weight": 0.5}])
    assert [(each["name"], each["weight"]) for each in answer["adapter"]["mix"]] == [("json", 0.5)]


async def test_weights_that_are_all_0_leave_the_base(shelved: Any) -> None:
    answer = await shelved.complete(adapters=[{"name": "json", "weight": 0}])
    assert answer["adapter"] is None
    assert shelved.engine.submitted[0].adapters == ()
    status, error = await shelved.refused(adapters=[{"name": "parrot", "weight": 0}])
    assert (status, error["param"]) == (404, "adapters.0.name")


async def test_a_mix_counts_once_for_each_name(shelved: Any) -> None:
    names = ("pirate@1", "json", "pirate@2")
    await shelved.complete(adapters=[{"name": name} for name in names])
    assert [record.adapters for record in shelved.records] == [("pirate", "json")]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"adapters": []}, 400, "adapters", "at least 1"),
        ({"adapters": {}}, 400, "adapters", "list"),
        ({"adapters": "pirate"}, 400, "adapters", "list"),
        ({"adapters": ["pirate"]}, 400, "adapters.0", "pirate"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters.0.name", "required"),
        ({"adapters": [{"name": 3}]}, 400, "adapters.0.name", "string"),
        ({"adapters": [{"name": "json", "weight": "1"}]}, 400, "adapters.0.weight", "number"),
        ({"adapters": [{"name": "json", "weight": True}]}, 400, "adapters.0.weight", "number"),
        ({"adapters": [{"name": "json", "weight": -100.5}]}, 400, "adapters.0.weight", "-100.5"),
        ({"adapters": [{"name": "json", "scale": 0.5}]}, 400, "adapters.0.scale", "not permitted"),
        ({"adapters": [{"name": f"extra-{n}"} for n in range(9)]}, 400, "adapters", "at most 8"),
        ({"adapters": [{"name": "json"}, {"name": "parrot"}]}, 404, "adapters.1.name", "'parrot'"),
        ({"adapters": [{"name": "tiny-base"}]}, 404, "adapters.0.name", "base model"),
        ({"adapters": [{"name": "stranger"}]}, 409, "adapters.0.name", "stranger@1"),
        ({"adapters": TWO, "model": "pirate"}, 400, "model", "'tiny-base'"),
        ({"adapters": TWO, "model": "parrot"}, 400, "model", "'tiny-base'"),
        ({"adapters": TWO, "adapter_id": "pirate"}, 400, "adapter_id", "adapters"),
        ({"adapters": TWO, "lora": [{"id": "json", "scale": 1}]}, 400, "lora", "adapters and lora"),
        ({"adapters": TWO, "merged_adapters": {"ids": ["json"]}}, 400, "merged_adapters", "send one"),
        ({"adapters": [{"name": "pirate"}, {"name": "pirate@2"}]}, 400, "adapters.1.name", "pirate@2"),
        ({"merged_adapters": {"ids": []}}, 400, "merged_adapters.ids", "at least 1"),
        ({"merged_adapters": {"weights": [1]}}, 400, "merged_adapters.ids", "required"),
        ({"merged_adapters": {"ids": ["json"], "weights": [1, 2]}}, 400, "merged_adapters", "1 ids"),
        ({"merged_adapters": {"ids": ["json"], "merge_strategy": "ties"}}, 400,
         "merged_adapters.merge_strategy", "'ties'"),
        ({"merged_adapters": {"ids": ["parrot"]}}, 404, "merged_adapters.ids.0", "'parrot'"),
        ({"lora": [{"id": 0, "scale": 1}]}, 400, "lora.0.id", "name one"),
        ({"lora": [{"id": "json"}]}, 400, "lora.0.scale", "required"),
        ({"adapter_scale": 0.5, "adapter_id": "json"}, 400, "adapter_scale", "change the answer"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
async def test_what_names_no_mix_is_refused_where_it_is_wrong(
    shelved: Any, path: str, fields: dict[str, Any], status: int, param: str, words: str
) -> None:
    found, error = await shelved.refused(path, **fields)
    assert (found, error["param"]) == (status, param)
    assert words in error["message"]
    assert shelved.engine.submitted == []


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_a_weight_that_is_no_number_is_refused(shelved: Any, word: str) -> None:
    text = f'{{"prompt": "hi", "adapters": [{{"name": "json", "weight": {word}}}]}}'
    async with shelved.client() as client:
        response = await client.post(PATH, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


async def test_virtual_tokens_are_neither_mixed_nor_weighted(shelved: Any) -> None:
    manifest_with(shelved, 2, virtual_tokens=20, method="prompt_tuning")
    for mix in ([{"name": "json"}, {"name": "pirate"}], [{"name": "json", "weight": 0.5}]):
        status, error = await shelved.refused(adapters=mix)
        assert (status, error["code"], error["param"]) == (422, "mix_not_served", "adapters")
        assert "json@1 (prompt_tuning)" in error["message"]
    await shelved.complete(adapters=[{"name": "json"}, {"name": "pirate", "weight": 0}])
    (submitted,) = shelved.engine.submitted
    assert [use.virtual_tokens for use in submitted.adapters] == [20]


async def test_a_mix_that_can_never_be_in_memory_is_refused_with_both_figures(shelved: Any) -> None:
    for index in (1, 2):
        manifest_with(shelved, index, prepared_bytes=BUDGET)
    two = [{"name": "pirate"}, {"name": "json"}]
    await shelved.complete(adapters=two)
    status, error = await shelved.refused(adapters=[*two, {"name": "extra-0", "weight": 0.1}])
    assert (status, error["code"]) == (422, "mix_not_served")
    assert "101 bytes" in error["message"]
    assert "is 100;" in error["message"]
    await shelved.complete(adapters=[*two, {"name": "extra-0", "weight": 0}])


async def test_a_mix_that_the_engine_finds_too_large_is_refused_like_one_that_the_manifests_show(
    shelved: Any,
) -> None:
    shelved.engine.failure = TokenEvent(
        "", finish_reason="error", error_code="mix_not_served", error_message="101 bytes together"
    )
    status, error = await shelved.refused(adapters=[{"name": "pirate"}, {"name": "json"}])
    assert (status, error["code"], error["message"]) == (422, "mix_not_served", "101 bytes together")


def test_a_mix_may_multiply_a_token_as_often_as_one_adapter() -> None:
    assert mixes.MAX_ROW_COPIES == routing.MAX_ROW_COPIES


async def test_a_mix_may_not_multiply_a_token_too_often(shelved: Any) -> None:
    manifest_with(shelved, 1, row_copies=8)
    manifest_with(shelved, 2, row_copies=4)
    await shelved.complete(adapters=[{"name": "pirate"}, {"name": "json"}])
    assert [use.row_copies for use in shelved.engine.submitted[0].adapters] == [8, 4]
    manifest_with(shelved, 2, row_copies=5)
    status, error = await shelved.refused(adapters=[{"name": "pirate"}, {"name": "json"}])
    assert (status, error["code"]) == (422, "mix_not_served")
    assert "40 times" in error["message"]
    await shelved.complete(adapters=[{"name": "pirate"}, {"name": "json", "weight": 0}])


async def test_each_adapter_of_a_mix_begins_at_its_own_invocation(shelved: Any) -> None:
    manifest_with(shelved, 1, invocation_tokens=(5, 6))
    manifest_with(shelved, 2, invocation_tokens=(7,))
    mix = [{"name": "pirate", "weight": 2}, {"name": "extra-0"}, {"name": "json"}]
    await shelved.complete(adapters=mix, prompt=[[1, 5, 6, 7], [7, 5, 6, 1]])
    places = [[use.from_position for use in submit.adapters] for submit in shelved.engine.submitted]
    assert places == [[1, 0, 3], [1, 0, 0]]
    status, error = await shelved.refused(adapters=mix, prompt=[5, 6])
    assert (status, error["param"]) == (400, "prompt")
    assert "json@1" in error["message"]


def named_mix(rig: Any, name: str, *parts: tuple[int, float]) -> Any:
    """A stored mix of the shelf's adapters, by their places."""
    record = rig.shelf.add(name)
    mix = tuple(MixPart(rig.shelf.records[index], weight) for index, weight in parts)
    rig.shelf.records[-1] = replace(record, parts=mix)
    return rig.shelf.records[-1]


@pytest.mark.parametrize("path", PATHS)
async def test_a_named_mix_is_asked_for_by_its_name_and_answers_as_its_parts(shelved: Any, path: str) -> None:
    mix = named_mix(shelved, "both", (0, 0.7), (2, -0.3))
    default: dict[str, Any] = {"prompt": "hi"}
    if "chat" in path:
        default = {"messages": [{"role": "user", "content": "hi"}]}
    response = await shelved.post(path, model="both", **default)
    assert response.status_code == 200, response.text
    (submitted,) = shelved.engine.submitted
    pirate, json = digest(shelved, 0), digest(shelved, 2)
    assert [(use.digest, use.weight) for use in submitted.adapters] == [(pirate, 0.7), (json, -0.3)]
    assert response.json()["model"] == "both"
    assert response.json()["adapter"] == {
        "name": "both",
        "version": 1,
        "digest": mix.digest,
        "mix": [
            {"name": "pirate", "version": 1, "digest": pirate, "weight": 0.7},
            {"name": "json", "version": 1, "digest": json, "weight": -0.3},
        ],
    }
    assert response.headers["x-timbre-adapter"] == "both@1"
    assert response.headers["x-timbre-adapter-digest"] == mix.digest
    assert [record.adapters for record in shelved.records] == [("both",)]
    model = (await shelved.get("/v1/models/both")).json()
    assert (model["root"], model["adapter"]["digest"]) == (f"both@{mix.digest}", mix.digest)


async def test_a_named_mix_within_a_mix_stands_for_its_parts(shelved: Any) -> None:
    named_mix(shelved, "both", (0, 0.5), (2, -0.25))
    answer = await shelved.complete(
        adapters=[{"name": "both", "weight": 2}, {"name": "pirate@1", "weight": -0.5}, {"name": "extra-1"}]
    )
    mix = [(each["name"], each["weight"]) for each in answer["adapter"]["mix"]]
    assert mix == [("pirate", 0.5), ("json", -0.5), ("extra-1", 1.0)]
    cancelled = await shelved.complete(
        adapters=[{"name": "both", "weight": 2}, {"name": "pirate@1", "weight": -1}]
    )
    assert [each["name"] for each in cancelled["adapter"]["mix"]] == ["json"]


async def test_named_mixes_are_held_to_the_limits_of_every_mix(shelved: Any) -> None:
    named_mix(shelved, "most", *((place, 0.1) for place in (0, 1, 2, 4, 5, 6, 7)))
    status, error = await shelved.refused(
        adapters=[{"name": "most"}, {"name": "extra-4"}, {"name": "extra-5"}]
    )
    assert (status, error["code"], error["param"]) == (422, "mix_not_served", "adapters")
    assert "9 adapters; at most 8" in error["message"]
    manifest_with(shelved, 0, prepared_bytes=2 * BUDGET)
    named_mix(shelved, "large", (0, 0.5), (2, 0.5))
    status, error = await shelved.refused(model="large")
    assert (status, error["code"], error["param"]) == (422, "mix_not_served", "model")
