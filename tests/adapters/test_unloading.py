"""An adapter that was deleted leaves with the last request that was made for it, running or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from timbre_methods.registry import methods
from timbre_server.engine.messages import Abort, AdapterUse, StepOutput, UnloadAdapter

METHODS_TESTS = Path(__file__).parent.parent / "methods"
PROMPT = [7, 3, 20, 41]
USE = (AdapterUse("deleted"),)


@pytest.fixture
def engine(load_module: Callable[[Path], ModuleType]) -> Any:
    """A real one, whose store has an adapter that is not in memory."""
    bench, tiny_models, pinned_engine = (
        load_module(path)
        for path in (
            METHODS_TESTS / "engine_bench.py",
            METHODS_TESTS / "tiny_models.py",
            Path(__file__).with_name("pinned_engine.py"),
        )
    )
    made = pinned_engine.PinnedEngine(bench, tiny_models.llama())
    linear = {path: site for path, site in made.sites.items() if site.kind == "linear"}
    made.store("deleted", *methods()["lora"].example(linear, torch.Generator().manual_seed(0)))
    return made


def departures(outputs: list[StepOutput]) -> list[tuple[str, str]]:
    return [(gone.digest, gone.reason) for output in outputs for gone in output.unloaded]


def turn_out(engine: Any) -> list[StepOutput]:
    outputs = []
    while engine.core.has_work:
        outputs.append(engine.turn())
    return [*outputs, engine.turn()]


def test_a_request_that_waits_is_answered_and_then_the_adapter_leaves(engine: Any) -> None:
    answer = engine.ask(PROMPT, USE)
    engine.core.take(UnloadAdapter("deleted"))
    *outputs, last = turn_out(engine)
    assert len(answer.token_ids) == 8
    assert (departures(outputs), departures([last])) == ([], [("deleted", "unloaded")])
    assert (engine.adapters.resident, engine.adapters.wanted) == ((), ())


def test_it_stays_while_another_request_for_it_waits(engine: Any) -> None:
    engine.bring_in("deleted")
    answers = [engine.ask(PROMPT, USE, max_tokens=count) for count in (1, 2, 5)]
    engine.core.take(UnloadAdapter("deleted"))
    outputs = turn_out(engine)
    assert [len(answer.token_ids) for answer in answers] == [1, 2, 5]
    assert departures(outputs) == departures(outputs[-1:]) == [("deleted", "unloaded")]
    assert engine.adapters.resident == ()


def test_it_leaves_when_the_last_one_that_waits_is_aborted(engine: Any) -> None:
    engine.ask(PROMPT, USE)
    engine.turn()
    engine.core.take(UnloadAdapter("deleted"))
    assert departures([engine.turn()]) == []
    engine.core.take(Abort("r0"))
    assert departures([engine.turn()]) == [("deleted", "unloaded")]
    assert (engine.adapters.resident, engine.adapters.wanted) == ((), ())


def test_once_gone_it_can_come_back(engine: Any) -> None:
    engine.ask(PROMPT, USE)
    engine.core.take(UnloadAdapter("deleted"))
    turn_out(engine)
    assert engine.bring_in("deleted") is None
    engine.ask(PROMPT, USE)
    assert departures(turn_out(engine)) == []
    assert engine.adapters.resident == ("deleted",)
