"""The loop's promises without sockets: failures stay where they belong, and every turn says what happened."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from timbre_server.adapters.derivation import Derivations
from timbre_server.engine.core import MAX_FAILED_STEPS, EngineCore
from timbre_server.engine.messages import Abort, LoadAdapter, StepOutput, TokenEvent, UnloadAdapter
from timbre_server.errors import EngineDied


def a_core(stand_ins: ModuleType, **options: Any) -> tuple[EngineCore, Any]:
    bench = stand_ins.a_bench(adapters=stand_ins.AdaptersBesideTheLoop(), **options)
    return EngineCore(
        bench.runner, bench.scheduler, bench.adapters, Derivations({}), stand_ins.a_pinning(bench.adapters)
    ), bench


def run(core: EngineCore) -> list[StepOutput]:
    outputs = []
    while core.has_work:
        outputs.append(core.step())
        assert len(outputs) < 200
    return outputs


def events_of(outputs: list[StepOutput], request_id: str) -> list[TokenEvent]:
    return [event for output in outputs for event in output.events if event.request_id == request_id]


def test_a_turn_without_work_says_that_nothing_ran(stand_ins: ModuleType) -> None:
    core, bench = a_core(stand_ins)
    output = core.step()
    assert (output.stats.batch_tokens, output.stats.step_seconds, output.events) == (0, 0.0, ())
    assert (core.has_work, bench.runner.plans) == (False, [])


def test_stats_add_up_over_a_run(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins)
    core.submit(stand_ins.a_request("a", 6, max_tokens=3, mix=(("x", 1.0),)))
    core.submit(stand_ins.a_request("b", 5, max_tokens=2))
    stats = [output.stats for output in run(core)]
    assert sum(each.prompt_tokens for each in stats) == 11
    assert sum(each.generation_tokens for each in stats) == 5
    assert sum(each.batch_tokens for each in stats) == 11 + 3
    assert stats[0].num_waiting_for_adapter == 1
    assert stats[0].waiting_adapters == ("x",)
    assert max(each.distinct_adapters for each in stats) == 1
    assert (stats[-1].num_running, stats[-1].num_waiting, stats[-1].num_kv_blocks_used) == (0, 0, 0)
    assert stats[-1].resident_adapters == ("x",)


def test_a_request_starts_once_however_many_steps_its_prompt_takes(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins, max_num_batched_tokens=4, max_num_seqs=1)
    core.submit(stand_ins.a_request("a", 10, max_tokens=2))
    core.submit(stand_ins.a_request("b", 3, max_tokens=1))
    assert [output.started for output in run(core) if output.started] == [("a",), ("b",)]


def test_a_failed_step_ends_its_requests_and_the_next_ones_are_served(stand_ins: ModuleType) -> None:
    failing = {"a"}
    runner = stand_ins.ScriptedRunner(
        fails=lambda plan: any(chunk.sequence.request_id in failing for chunk in plan.chunks)
    )
    core, bench = a_core(stand_ins, runner=runner, max_num_seqs=1)
    core.submit(stand_ins.a_request("a"))
    core.submit(stand_ins.a_request("b", max_tokens=2))
    outputs = run(core)
    (failed,) = events_of(outputs, "a")
    assert (failed.finish_reason, failed.error_code) == ("error", "engine_error")
    assert "on fire" not in (failed.error_message or "")
    assert events_of(outputs, "b")[-1].finish_reason == "length"
    bench.check_nothing_is_held()


def test_an_engine_whose_steps_keep_failing_gives_up(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins, runner=stand_ins.ScriptedRunner(fails=lambda plan: True), max_num_seqs=1)
    for index in range(MAX_FAILED_STEPS):
        core.submit(stand_ins.a_request(f"r{index}"))
    for _ in range(MAX_FAILED_STEPS - 1):
        core.step()
    with pytest.raises(EngineDied, match="3 steps in a row failed, the last with RuntimeError"):
        core.step()


def test_a_step_that_succeeds_forgives_those_that_failed(stand_ins: ModuleType) -> None:
    runner = stand_ins.ScriptedRunner(fails=lambda plan: plan.chunks[0].sequence.request_id.startswith("bad"))
    core, _ = a_core(stand_ins, runner=runner, max_num_seqs=1)
    for index in range(2 * MAX_FAILED_STEPS):
        core.submit(stand_ins.a_request(f"bad{index}"))
        if index % 2:
            core.submit(stand_ins.a_request(f"good{index}", max_tokens=1))
    finals = [event for output in run(core) for event in output.events]
    assert [event.finish_reason for event in finals].count("length") == MAX_FAILED_STEPS


def test_an_adapter_wished_for_is_loaded_while_the_step_runs(stand_ins: ModuleType) -> None:
    core, bench = a_core(stand_ins)
    core.submit(stand_ins.a_request("a", mix=(("x", 1.0),), max_tokens=1))
    core.submit(stand_ins.a_request("b", max_tokens=3))
    core.step()
    assert bench.adapters.begun == ["x"]
    assert core.step().loaded[0].digest == "x"


def test_an_adapter_that_fails_to_load_ends_only_its_requests(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins)
    core.submit(stand_ins.a_request("a", mix=(("bad", 1.0),)))
    core.submit(stand_ins.a_request("b", max_tokens=2))
    outputs = run(core)
    assert events_of(outputs, "a")[-1].error_code == "adapter_load_failed"
    assert events_of(outputs, "b")[-1].finish_reason == "length"


def test_loading_and_unloading_are_answered_each_time(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins)
    core.take(LoadAdapter("x"))
    first, second = core.step(), core.step()
    (loaded,) = first.loaded + second.loaded
    assert (loaded.digest, loaded.method, loaded.error_code) == ("x", "scripted", None)
    core.take(LoadAdapter("x"))
    assert [each.digest for each in core.step().loaded] == ["x"]
    core.take(UnloadAdapter("x"))
    output = core.step()
    assert [(each.digest, each.reason) for each in output.unloaded] == [("x", "unloaded")]
    assert output.stats.resident_adapters == ()


def test_a_failed_load_says_why(stand_ins: ModuleType) -> None:
    core, _ = a_core(stand_ins)
    core.take(LoadAdapter("bad"))
    (loaded,) = core.step().loaded + core.step().loaded
    assert (loaded.error_code, loaded.error_message) == ("adapter_load_failed", "bad is broken")


def test_an_abort_is_answered_in_the_next_turn(stand_ins: ModuleType) -> None:
    core, bench = a_core(stand_ins)
    core.take(stand_ins.a_request("a", max_tokens=9))
    core.step()
    core.take(Abort("a"))
    bench.check_nothing_is_held()
    assert [event.finish_reason for event in core.step().events] == ["abort"]
    assert not core.has_work
