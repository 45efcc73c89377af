"""Adapters that act from an invocation sequence on: where it is in the prompt, and prompts without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timbre_server.http.voice import last_occurrence


@pytest.fixture
def activated(rig: Any) -> Any:
    """A rig with one adapter that waits for the tokens 5, 6."""
    record = rig.shelf.add("activated")
    rig.shelf.records[0] = replace(record, manifest=replace(record.manifest, invocation_tokens=(5, 6)))
    return rig


async def test_each_prompt_is_adapted_from_its_own_last_occurrence_on(activated: Any) -> None:
    prompts = [[5, 6, 1], [1, 2, 5, 6], [5, 6, 5, 6, 5]]
    await activated.complete(model="activated", prompt=prompts, n=2)
    places = {tuple(s.prompt_token_ids): s.adapters[0].from_position for s in activated.engine.submitted}
    assert places == {(5, 6, 1): 0, (1, 2, 5, 6): 2, (5, 6, 5, 6, 5): 2}


@pytest.mark.parametrize("prompt", [[1, 2, 3], [6, 5], [5], [5, 1, 6]])
async def test_a_prompt_without_the_sequence_is_refused_by_the_adapter_s_name(
    activated: Any, prompt: list[int]
) -> None:
    status, error = await activated.refused(model="activated", prompt=[[5, 6], prompt])
    assert (status, error["param"]) == (400, "prompt")
    assert "activated@1" in error["message"]
    assert "[5, 6]" in error["message"]
    assert activated.engine.submitted == []


async def test_what_was_cut_off_the_prompt_does_not_count(activated: Any) -> None:
    status, _ = await activated.refused(
        model="activated", prompt=[5, 6, 1, 2], truncate_prompt_tokens=3, max_tokens=1
    )
    assert status == 400


@given(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.lists(st.integers(0, 2), max_size=12))
def test_the_last_occurrence_is_the_one_found(sought: list[int], tokens: list[int]) -> None:
    every = [at for at in range(len(tokens)) if tokens[at:][: len(sought)] == sought]
    assert last_occurrence(sought, tokens) == (every[-1] if every else None)
