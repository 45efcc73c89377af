"""Virtual tokens of an adapter: told to the engine, counted in the room, shown to nobody."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

PATH = "/v1/completions"
V = 20


@pytest.fixture
def tuned(rig: Any) -> Any:
    """A rig with one adapter of 20 virtual tokens."""
    record = rig.shelf.add("tuned")
    rig.shelf.records[0] = replace(record, manifest=replace(record.manifest, virtual_tokens=V))
    return rig


async def test_the_engine_is_told_and_the_usage_is_not(tuned: Any) -> None:
    answer = await tuned.complete(model="tuned", prompt=[1, 2, 3], max_tokens=2)
    (submitted,) = tuned.engine.submitted
    assert [use.virtual_tokens for use in submitted.adapters] == [V]
    assert submitted.prompt_token_ids == [1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 3
    await tuned.complete(prompt=[1, 2, 3])
    assert tuned.engine.submitted[1].adapters == ()


async def test_they_take_their_room_in_the_context(tuned: Any) -> None:
    most = tuned.engine.info.max_model_len
    await tuned.complete(model="tuned", prompt=[1, 2, 3], max_tokens=most - V - 3)
    status, error = await tuned.refused(model="tuned", prompt=[1, 2, 3], max_tokens=most - V - 2)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert f"the adapter takes {V} of them" in error["message"]
    await tuned.chat(model="tuned")
    submitted = tuned.engine.submitted[-1]
    assert submitted.sampling.max_tokens == most - V - len(submitted.prompt_token_ids)
