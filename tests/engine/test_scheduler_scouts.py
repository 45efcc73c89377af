"""Sequences with a pass of the base alone beside their own: two tables that go together."""

from __future__ import annotations

from types import ModuleType

import pytest

SCOUTING = {"mix": (("x", 1.0, 0, 0, 1, True),)}


def test_the_bases_pass_and_requests_for_the_base_know_each_others_prefix(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("scouting", range(10), max_tokens=1, **SCOUTING))
    bench.run()
    bench.submit(stand_ins.a_request("base", range(10), max_tokens=1))
    bench.run()
    assert bench.final("base").cached_tokens == 8
    bench.submit(stand_ins.a_request("again", range(10), max_tokens=1, **SCOUTING))
    bench.run()
    assert bench.final("again").cached_tokens == 8


def test_what_one_of_the_passes_alone_knows_is_computed_again(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("base", range(10), max_tokens=1))
    bench.run()
    bench.submit(stand_ins.a_request("scouting", range(10), max_tokens=1, **SCOUTING))
    bench.run()
    assert bench.final("scouting").cached_tokens == 0


def test_both_passes_need_room_and_give_it_back(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=9)
    free = bench.scheduler.blocks.num_free
    bench.submit(stand_ins.a_request("a", 8, max_tokens=4, **SCOUTING))
    while not any(bench.runner.plans):
        bench.turn()
    assert free - bench.scheduler.blocks.num_free >= 2 * bench.scheduler.blocks.blocks_for(8)
    bench.submit(stand_ins.a_request("b", 8, max_tokens=4))
    bench.run()
    assert len(bench.tokens("a")) == len(bench.tokens("b")) == 4
    assert bench.scheduler.blocks.num_free == free


@pytest.mark.parametrize("num_blocks", [14, 20])
def test_crowded_scouts_give_the_tokens_that_they_give_alone(stand_ins: ModuleType, num_blocks: int) -> None:
    requests = [
        stand_ins.a_request(name, 5 + 2 * number, max_tokens=9, **(SCOUTING if number % 2 else {}))
        for number, name in enumerate(("a", "bb", "ccc", "dddd"))
    ]
    bench = stand_ins.a_bench(num_blocks=num_blocks, max_num_batched_tokens=7)
    for request in requests:
        bench.submit(request)
    bench.run()
    for request in requests:
        assert bench.tokens(request.request_id) == stand_ins.tokens_alone(request)
