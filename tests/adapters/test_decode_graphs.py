"""Recorded decode steps give the tokens of steps that run as usual: whole requests, on the real engine.

Without a GPU a recording runs its function again, which reads the tensors that it was recorded with: all but
CUDA's own replay is tried, attention's kernel too, under Triton's interpreter.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the tiny models are on the CPU, where kernels need the interpreter", allow_module_level=True)

from timbre_methods.registry import methods
from timbre_server.engine import paged_decode, runner
from timbre_server.engine.decode_graphs import RECORD_AT, DecodeGraphs, kept_bytes
from timbre_server.engine.messages import AdapterUse, UnloadAdapter
from timbre_server.engine.paged_decode import DecodeStep
from timbre_server.operators.contract import Bound

METHODS_TESTS = Path(__file__).parent.parent / "methods"
PROMPT = [7, 3, 20, 41, 30, 2, 11, 5, 9]
BASE: tuple[AdapterUse, ...] = ()
METHODS = {"one": "lora", "two": "fourierft", "routed": "mola"}
USES = {name: (AdapterUse(name),) for name in METHODS}
CROWD = (BASE, USES["one"], USES["two"], (AdapterUse("one", 0.4), AdapterUse("two", 0.5)), USES["routed"])

LoadModule = Callable[[Path], ModuleType]


class Tape:
    """Counts recordings and replays; may fail."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.fails = False

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        run()

        def replay() -> Tensor:
            self.replayed += 1
            return run()

        return replay


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def start(load_module: LoadModule, monkeypatch: pytest.MonkeyPatch, tape: Tape) -> Callable[..., Any]:
    """An engine around a tiny model, that records or does not."""
    bench = load_module(METHODS_TESTS / "engine_bench.py")
    pinned_engine = load_module(Path(__file__).with_name("pinned_engine.py"))
    tiny_models = load_module(METHODS_TESTS / "tiny_models.py")

    def graphs_for(prepared: Any, cache: Any, adapters: Any, limits: tuple[int, int]) -> DecodeGraphs:
        return DecodeGraphs(prepared.loaded.model, cache, adapters, DecodeStep, tape.record, limits)

    monkeypatch.setattr(paged_decode, "PROGRAMS", 1)  # The interpreter runs them one after the other.

    def started(records: bool, family: str = "llama") -> Any:
        monkeypatch.setattr(runner, "graphs_for", graphs_for if records else lambda *_: None)
        model: nn.Module = getattr(tiny_models, family)()
        engine = pinned_engine.PinnedEngine(bench, model)
        for name, method in METHODS.items():
            store(engine, name, method)
        return engine

    return started


def store(engine: Any, name: str, method: str, seed: int = 0) -> None:
    read = methods()[method]
    sites = {path: site for path, site in engine.sites.items() if site.kind == "linear"}
    engine.store(name, *read.example(sites, torch.Generator().manual_seed(seed)))
    engine.bring_in(name)


def asked(uses: tuple[tuple[AdapterUse, ...], ...]) -> list[tuple[list[int], tuple[AdapterUse, ...]]]:
    return [(PROMPT[at:] + PROMPT[:at], mix) for at, mix in enumerate(uses)]


@pytest.mark.parametrize("uses", [(BASE,) * 3, CROWD], ids=["base", "crowd"])
def test_recorded_steps_give_the_same_tokens(
    start: Callable[[bool], Any], tape: Tape, uses: tuple[tuple[AdapterUse, ...], ...]
) -> None:
    want = start(False).answers(*asked(uses), max_tokens=8)
    got = start(True).answers(*asked(uses), max_tokens=8)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    assert tape.recorded == 1
    assert tape.replayed == 7 - RECORD_AT


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_soft_caps_and_sinks_are_recorded_too(start: Callable[..., Any], tape: Tape, family: str) -> None:
    want = start(False, family).answers(*asked((BASE, USES["one"])), max_tokens=6)
    got = start(True, family).answers(*asked((BASE, USES["one"])), max_tokens=6)
    assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    assert tape.replayed == 5 - RECORD_AT


def test_a_graph_of_base_rows_serves_fewer_rows_too(start: Callable[[bool], Any], tape: Tape) -> None:
    engine = start(True)
    four = engine.answers(*asked((BASE,) * 4), max_tokens=6)
    three = engine.answers(*asked((BASE,) * 3), max_tokens=6)
    assert [a.token_ids for a in three] == [a.token_ids for a in four[:3]]
    assert tape.recorded == 1


def test_an_adapter_that_leaves_takes_its_recordings_along(start: Callable[[bool], Any], tape: Tape) -> None:
    engine = start(True)
    ask = asked((USES["one"], USES["two"]))
    before = engine.answers(*ask, max_tokens=5)
    engine.core.take(UnloadAdapter("one"))
    engine.turn_until(lambda output: bool(output.unloaded))
    answers = []
    for each in (engine, start(False)):
        store(each, "other", "lora", seed=5)
        answers.append(each.answers(*asked(((AdapterUse("other"),), USES["two"])), max_tokens=5))
    after, want = answers
    assert [a.token_ids for a in after] == [a.token_ids for a in want]
    assert after[0].token_ids != before[0].token_ids
    assert tape.recorded == 2


def test_what_cannot_be_recorded_runs_as_usual_and_is_not_tried_again(
    start: Callable[[bool], Any], tape: Tape, caplog: pytest.LogCaptureFixture
) -> None:
    want = start(False).answers(*asked(CROWD), max_tokens=8)
    tape.fails = True
    engine = start(True)
    for _ in range(2):
        got = engine.answers(*asked(CROWD), max_tokens=8)
        assert [answer.token_ids for answer in got] == [answer.token_ids for answer in want]
    assert caplog.text.count("without a CUDA graph") <= 2
    assert tape.replayed == 0


def test_a_step_that_is_recorded_tells_the_choices_of_routers_once(
    start: Callable[[bool], Any], tape: Tape
) -> None:
    counts: list[list[Any]] = []
    for records in (False, True):
        engine = start(records)
        engine.ask(PROMPT, USES["routed"], max_tokens=6)
        counts.append([])
        while engine.core.has_work:
            counts[-1].append(engine.turn().stats.expert_tokens)
    usual, recorded = counts
    assert tape.replayed > 0
    assert all(recorded)
    # What a replay writes anew is the recording's, which only CUDA's own does.
    assert recorded[: RECORD_AT + 1] == usual[: RECORD_AT + 1]


def test_recordings_of_base_rows_keep_nothing_of_adapters(start: Callable[[bool], Any], tape: Tape) -> None:
    engine = start(True)
    others = bounds()
    engine.answers(*asked((USES["one"],) * 2), max_tokens=6)
    engine.answers(*asked((BASE,) * 2), max_tokens=6)
    assert tape.recorded == 2
    assert len(bounds()) > len(others)
    engine.core.take(UnloadAdapter("one"))
    engine.turn_until(lambda output: bool(output.unloaded))
    assert len(bounds()) == len(others)


def test_what_recordings_keep_is_known_beforehand() -> None:
    assert kept_bytes(3, vocab_size=10) == (1 + 2 + 4 + 3) * 10 * 4


def bounds() -> list[Bound]:
    """What is prepared for rows, in this process."""
    gc.collect()
    return [each for each in gc.get_objects() if issubclass(type(each), Bound)]
