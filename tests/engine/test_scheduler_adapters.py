"""Requests wait for their adapters without holding others back, and without starving."""

from __future__ import annotations

from types import ModuleType

import pytest


def test_a_request_waiting_for_its_adapter_holds_nobody_back(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(adapters=stand_ins.LoadingAdapters(delay=5))
    bench.submit(stand_ins.a_request("slow", mix=(("x", 1.0),), max_tokens=1))
    bench.submit(stand_ins.a_request("base", max_tokens=1))
    bench.turn()
    assert bench.final("base").finish_reason == "length"
    assert bench.scheduler.counts.waiting_for_adapter == 1
    assert bench.scheduler.waiting_adapters == ("x",)
    bench.run()
    assert bench.final("slow").finish_reason == "length"
    assert bench.scheduler.waiting_adapters == ()


def test_a_mix_is_acquired_whole_or_not_at_all(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.adapters.users["x"] = 0
    bench.submit(stand_ins.a_request("a", mix=(("x", 0.5), ("y", 0.25), ("x", 0.25)), max_tokens=2))
    bench.turn()
    assert bench.adapters.users == {"x": 0}
    chunk = bench.turn().chunks[0]
    assert [weight for _, weight in chunk.sequence.adapter_slots] == [0.75, 0.25]
    assert bench.adapters.users == {"x": 1, "y": 1}
    bench.run()
    bench.check_nothing_is_held()


def test_an_adapter_that_cannot_be_loaded_ends_only_its_own_requests(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(
        stand_ins.a_request("a", mix=(("good", 1.0), ("bad", 1.0))), stand_ins.a_request("b", max_tokens=1)
    )
    bench.run()
    final = bench.final("a")
    assert (final.finish_reason, final.error_code, final.error_message) == (
        "error",
        "adapter_load_failed",
        "bad is broken",
    )
    assert bench.final("b").finish_reason == "length"


def test_a_request_is_not_starved_by_requests_for_adapters_in_memory(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(adapters=stand_ins.LoadingAdapters(capacity=1), max_skips=3)
    bench.adapters.users["x"] = 0
    bench.submit(stand_ins.a_request("x0", mix=(("x", 1.0),), max_tokens=4))
    bench.turn()
    bench.submit(stand_ins.a_request("other", mix=(("y", 1.0),), max_tokens=1))
    for turn in range(1, 40):
        bench.submit(stand_ins.a_request(f"x{turn}", mix=(("x", 1.0),), max_tokens=4))
        bench.turn()
        if bench.events_of("other"):
            break
    assert bench.final("other").finish_reason == "length"
    admitted_before = {event.request_id for event in bench.events} - {"x0", "other"}
    assert len(admitted_before) == 3


def test_base_requests_pass_a_starving_one(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(adapters=stand_ins.LoadingAdapters(delay=1000), max_skips=1)
    bench.submit(stand_ins.a_request("starving", mix=(("y", 1.0),)))
    for index in range(4):
        bench.submit(stand_ins.a_request(f"base{index}", max_tokens=1))
        bench.turn()
        assert bench.final(f"base{index}").finish_reason == "length"


def test_an_adapter_is_no_longer_asked_for_when_its_last_request_was_aborted(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(adapters=stand_ins.LoadingAdapters(delay=50))
    bench.submit(*(stand_ins.a_request(name, mix=(("x", 1.0), ("y", 0.5))) for name in ("a", "b")))
    bench.submit(stand_ins.a_request("c", mix=(("y", 1.0),)))
    bench.turn()
    bench.scheduler.abort("a")
    assert set(bench.adapters.loading) == {"x", "y"}
    bench.scheduler.abort("b")
    assert set(bench.adapters.loading) == {"y"}
    bench.run()
    assert bench.final("c").finish_reason == "length"


@pytest.mark.parametrize("turns", range(6))
def test_an_aborted_request_frees_everything_at_any_moment(stand_ins: ModuleType, turns: int) -> None:
    bench = stand_ins.a_bench(max_num_batched_tokens=5, adapters=stand_ins.LoadingAdapters(delay=1))
    bench.submit(stand_ins.a_request("a", 11, mix=(("x", 1.0),), max_tokens=9))
    for _ in range(turns):
        bench.turn()
    bench.scheduler.abort("a")
    bench.check_nothing_is_held()
    bench.run()
    assert bench.final("a").finish_reason == "abort"
