"""The routes that pin and unpin: what they resolve, refuse and show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

MERGED = {"mode": "merged"}


async def pin(served: Any, reference: str, body: object = None) -> Any:
    return await served.client.post(f"/v1/adapters/{reference}/pin", json=body or MERGED)


async def test_a_pin_is_of_the_digest_that_the_name_led_to(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    first = (await served.upload(adapter_files(seed=0))).json()
    assert (await served.client.get("/v1/adapters/pirate")).json()["pinned"] is None
    answer = await pin(served, "pirate")
    assert answer.status_code == 200, answer.text
    shown = {"mode": "merged", "sites": 7, "bytes": 1000}
    assert (answer.json()["id"], answer.json()["pinned"]) == ("pirate@1", shown)
    assert served.engine.pins == {first["digest"]: ((first["digest"], 1.0),)}

    second = (await served.upload(adapter_files(seed=1))).json()
    assert second["version"] == 2
    assert (await served.client.get("/v1/adapters/pirate")).json()["pinned"] is None
    assert (await served.client.get("/v1/adapters/pirate@1")).json()["pinned"] == shown
    wrong = await served.client.delete("/v1/adapters/pirate/pin")
    assert wrong.status_code == 409
    assert f"pirate@2 is not pinned; the first ({first['digest']}) is" in wrong.json()["error"]["message"]
    right = await served.client.delete("/v1/adapters/pirate@1/pin")
    assert (right.status_code, right.json()["pinned"]) == (200, None)
    assert (await served.client.get("/v1/adapters/pirate@1")).json()["pinned"] is None


async def test_a_second_pin_is_a_conflict_that_names_the_first(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    for seed, name in enumerate(("one", "two")):
        await served.upload(adapter_files(seed=seed), name=(None, name))
    await pin(served, "one")
    answer = await pin(served, "two")
    digest = served.store.resolve("one").digest
    assert answer.status_code == 409
    assert answer.json()["error"] == {
        "message": f"the first ({digest}) is pinned, and one is pinned at a time; unpin it first",
        "type": "conflict_error", "param": None, "code": "pin_conflict",
    }  # fmt: skip
    assert (await pin(served, "one")).status_code == 200, "once more changes nothing"
    await served.client.delete("/v1/adapters/one/pin")
    nothing = await served.client.delete("/v1/adapters/one/pin")
    assert (nothing.status_code, nothing.json()["error"]["code"]) == (409, "pin_conflict")


async def test_a_named_mix_is_pinned_as_its_parts(serve: Callable[..., Any], adapter_files: Any) -> None:
    served = serve()
    for seed, name in enumerate(("one", "two", "three")):
        await served.upload(adapter_files(seed=seed), name=(None, name))
    digests = {name: served.store.resolve(name).digest for name in ("one", "two", "three")}
    parents = [
        {"name": "one", "weight": 0.5},
        {"name": "two", "weight": -0.25},
        {"name": "three", "weight": 0},
    ]
    made = await served.client.post("/v1/recipes", json={"name": "mix", "kind": "linear", "parents": parents})
    assert made.status_code == 201, made.text
    assert (await pin(served, "mix")).status_code == 200
    mix = served.engine.pins[made.json()["digest"]]
    assert dict(mix) == {digests["one"]: 0.5, digests["two"]: -0.25}


async def test_without_the_flag_both_routes_refuse_and_name_it(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve(allow_pins=False)
    await served.upload(adapter_files())
    for answer in (await pin(served, "pirate"), await served.client.delete("/v1/adapters/pirate/pin")):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "not_allowed"
        assert "--allow-merged-pin" in answer.json()["error"]["message"]
    assert served.engine.pins == {}


async def test_what_the_engine_refuses_is_answered_with_422(
    serve: Callable[..., Any], adapter_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve()
    digest = (await served.upload(adapter_files())).json()["digest"]
    monkeypatch.setattr("timbre_server.http.pins._mix", lambda room, record: ((digest, 1.0),) * 3)
    answer = await pin(served, "pirate")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "pin_not_served")


@pytest.mark.parametrize("body", [{}, {"mode": "split"}, {"mode": "merged", "more": 1}, [], {"mode": None}])
async def test_a_body_that_says_anything_else_is_refused(
    serve: Callable[..., Any], adapter_files: Any, body: object
) -> None:
    served = serve()
    await served.upload(adapter_files())
    answer = await served.client.post("/v1/adapters/pirate/pin", json=body)
    assert answer.status_code == 400
    assert served.engine.pins == {}


async def test_a_name_that_leads_nowhere_is_not_found(serve: Callable[..., Any]) -> None:
    served = serve()
    assert (await pin(served, "nobody")).status_code == 404
    assert (await served.client.delete("/v1/adapters/nobody/pin")).status_code == 404


async def test_a_page_of_another_site_cannot_pin(serve: Callable[..., Any], adapter_files: Any) -> None:
    served = serve()
    await served.upload(adapter_files())
    answer = await served.client.post(
        "/v1/adapters/pirate/pin", content='{"mode": "merged"}', headers={"Content-Type": "text/plain"}
    )
    assert (answer.status_code, served.engine.pins) == (415, {})
