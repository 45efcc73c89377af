"""Known prefixes are read, never shared wrongly, and survive preemption."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from timbre_server.engine import block_tables


def test_prompt_scores_come_whole_with_the_first_token_and_skip_the_cache(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_num_batched_tokens=5)
    bench.submit(stand_ins.a_request("warm", range(12), max_tokens=1))
    bench.run()
    bench.submit(stand_ins.a_request("a", range(12), max_tokens=2, prompt_logprobs=3))
    bench.run()
    first, second = bench.events_of("a")
    assert [score.token_id for score in first.prompt_logprobs[1:]] == list(range(1, 12))
    assert (first.cached_tokens, second.prompt_logprobs) == (0, ())


def test_prompt_scores_survive_preemption(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=7)
    bench.submit(stand_ins.a_request("older", 7, max_tokens=15))
    bench.submit(stand_ins.a_request("scored", 7, max_tokens=8, prompt_logprobs=0))
    bench.run()
    assert any(start == 0 and end > 7 for name, start, end in sum(bench.runner.plans, ()) if name == "scored")
    carried = [event.prompt_logprobs for event in bench.events_of("scored") if event.prompt_logprobs]
    assert [len(scores) for scores in carried] == [7]


def test_a_known_prefix_is_not_computed_again(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", range(10), max_tokens=1))
    bench.run()
    bench.submit(stand_ins.a_request("b", [*range(10), 3], max_tokens=1))
    bench.turn()
    assert bench.runner.plans[-1] == (("b", 8, 11),)
    assert bench.final("b").cached_tokens == 8
    assert (bench.scheduler.counts.prefix_queried_tokens, bench.scheduler.counts.prefix_hit_tokens) == (11, 8)


def test_at_least_one_row_runs_on_a_wholly_known_prompt(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    for name in "ab":
        bench.submit(stand_ins.a_request(name, range(8), max_tokens=1))
        bench.run()
    assert bench.runner.plans[-1] == (("b", 4, 8),)
    assert bench.tokens("a") == bench.tokens("b")


@pytest.mark.parametrize("other", [{"salt": "tenant"}, {"mix": (("x", 1.0),)}])
def test_no_prefix_is_shared_across_salts_or_mixes(stand_ins: ModuleType, other: dict[str, Any]) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", range(10), max_tokens=1))
    bench.run()
    bench.submit(stand_ins.a_request("b", range(10), max_tokens=1, **other))
    bench.run()
    assert bench.final("b").cached_tokens == 0


def test_nothing_is_cached_where_prefix_caching_is_off(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(enable_prefix_caching=False)
    for name in "ab":
        bench.submit(stand_ins.a_request(name, range(10), max_tokens=1))
        bench.run()
    assert bench.runner.plans[-1] == (("b", 0, 10),)


def test_each_block_is_hashed_once(stand_ins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[tuple[bytes, tuple[int, ...]]] = []
    original = block_tables.block_hash

    def counting(parent: bytes, token_ids: list[int]) -> bytes:
        hashed.append((parent, tuple(token_ids)))
        return original(parent, token_ids)

    monkeypatch.setattr(block_tables, "block_hash", counting)
    bench = stand_ins.a_bench(num_blocks=12)
    bench.submit(*(stand_ins.a_request(name, [index] * 9, max_tokens=20) for index, name in enumerate("abc")))
    bench.run()
    assert bench.runner.plans[0] == (("a", 0, 9), ("b", 0, 7))
    assert len(hashed) == len(set(hashed)) == 3 * 7


def test_a_preempted_request_gives_the_same_tokens(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=9)
    requests = [
        stand_ins.a_request(
            name, [index, 5, 7], max_tokens=20, temperature=1.0, seed=index, frequency_penalty=0.3
        )
        for index, name in enumerate("abc")
    ]
    bench.submit(*requests)
    preemptions = 0
    while bench.scheduler.has_work:
        bench.turn()
        preemptions += bench.scheduler.counts.preemptions
    assert preemptions > 0
    for request in requests:
        assert bench.tokens(request.request_id) == stand_ins.tokens_alone(request)
    bench.check_nothing_is_held()


def test_the_oldest_request_is_never_preempted(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=9)
    bench.submit(*(stand_ins.a_request(name, [index] * 3, max_tokens=20) for index, name in enumerate("abc")))
    bench.run()
    starts = [start for name, start, _ in sum(bench.runner.plans, ()) if name == "a"]
    assert starts == [0, *range(3, 22)]


def test_tokens_are_counted_once_though_they_are_computed_twice(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=9)
    bench.submit(*(stand_ins.a_request(name, [index] * 3, max_tokens=20) for index, name in enumerate("abc")))
    prompt = generation = 0
    while bench.scheduler.has_work:
        bench.turn()
        prompt += bench.scheduler.counts.prompt_tokens
        generation += bench.scheduler.counts.generation_tokens
    assert (prompt, generation) == (9, 60)


def test_virtual_tokens_are_shared_by_one_adapter_s_requests_and_told_to_nobody(
    stand_ins: ModuleType,
) -> None:
    bench = stand_ins.a_bench()
    for name, digest in (("a", "x"), ("b", "x"), ("c", "y")):
        request = stand_ins.a_request(name, range(6), max_tokens=1, mix=((digest, 1.0, 7),))
        bench.submit(request)
        bench.run()
    started = {name: start for name, start, _ in sum(bench.runner.plans, ())}
    assert started == {"a": 0, "b": 12, "c": 0}
    assert bench.final("b").cached_tokens == 5


def test_blocks_before_an_adapter_begins_are_those_of_requests_without_it(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    for name, mix in (("base", ()), ("late", (("x", 1.0, 0, 9),)), ("again", (("x", 1.0, 0, 9),))):
        bench.submit(stand_ins.a_request(name, range(18), max_tokens=1, mix=mix))
        bench.run()
    started = {name: start for name, start, _ in reversed(sum(bench.runner.plans, ()))}
    assert started == {"base": 0, "late": 8, "again": 16}
