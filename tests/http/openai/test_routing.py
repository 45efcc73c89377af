"""``return_routing``: which experts acted on each token, told in the answer."""

from __future__ import annotations

from typing import Any

import pytest

from timbre_server.engine.messages import Routing

PATHS = ("/v1/completions", "/v1/chat/completions")


def routed(rig: Any) -> dict[str, Any]:
    """Adds a mixture that routes at two places for every token; returns what an answer says of one."""
    digest, label = rig.shelf.add("chorus").digest, "chorus@1"
    rig.engine.routing = (
        Routing(digest, "model.layers.0.mlp", (2, 0), (0.75, 0.25)),
        Routing(digest, "model.layers.1.mlp", (1,), (1.0,)),
    )
    return {
        label: {
            "model.layers.0.mlp": {"experts": [2, 0], "gates": [0.75, 0.25]},
            "model.layers.1.mlp": {"experts": [1], "gates": [1.0]},
        }
    }


async def test_a_completion_tells_the_experts_of_each_token(rig: Any) -> None:
    of_token = routed(rig)
    body = await rig.complete(model="chorus", return_routing=True, max_tokens=3)
    assert [choice["routing"] for choice in body["choices"]] == [[of_token] * 3]
    assert [submit.return_routing for submit in rig.engine.submitted] == [True]


async def test_a_chat_tells_the_experts_of_each_token(rig: Any) -> None:
    of_token = routed(rig)
    body = await rig.chat(model="chorus", return_routing=True, max_tokens=3)
    assert [choice["routing"] for choice in body["choices"]] == [[of_token] * 3]


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_tells_them_with_the_tokens_that_they_belong_to(path: str, rig: Any) -> None:
    of_token = routed(rig)
    chunks = await rig.stream(path, model="chorus", return_routing=True, max_tokens=3)
    told = [token for chunk in chunks for choice in chunk["choices"] for token in choice.get("routing", ())]
    assert told == [of_token] * 3


async def test_nobody_is_told_who_did_not_ask(rig: Any) -> None:
    routed(rig)
    body = await rig.complete(model="chorus")
    assert "routing" not in body["choices"][0]
