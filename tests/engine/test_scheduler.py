"""Plans keep their budgets, and every request ends once, for the right reason."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from timbre_server.engine.messages import Submit
from timbre_server.engine.scheduler import SchedulerLimits


def test_a_long_prompt_is_computed_in_chunks_beside_decodes(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_num_batched_tokens=8)
    bench.submit(stand_ins.a_request("a", 3, max_tokens=5))
    bench.turn()
    bench.submit(stand_ins.a_request("long", 20, max_tokens=2))
    bench.run()
    assert bench.runner.plans == [
        (("a", 0, 3),),
        (("a", 3, 4), ("long", 0, 7)),
        (("a", 4, 5), ("long", 7, 14)),
        (("a", 5, 6), ("long", 14, 20)),
        (("a", 6, 7), ("long", 20, 21)),
    ]
    assert bench.tokens("long") == stand_ins.tokens_alone(stand_ins.a_request("long", 20, max_tokens=2))


def test_rows_that_run_several_times_fill_a_step_sooner(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_num_batched_tokens=8)
    bench.submit(stand_ins.a_request("a", 5, mix=[("mixture", 1.0, 0, 0, 3)]), stand_ins.a_request("b", 9))
    while len(bench.runner.plans) < 4:
        bench.turn()
    assert bench.runner.plans == [
        (("b", 0, 8),),
        (("b", 8, 9), ("a", 0, 2)),
        (("b", 9, 10), ("a", 2, 4)),
        (("a", 4, 5), ("b", 10, 11)),
    ]


def test_no_more_sequences_run_than_allowed(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_num_seqs=2)
    bench.submit(*(stand_ins.a_request(name, 3, max_tokens=2) for name in "abc"))
    bench.run()
    assert [[name for name, _, _ in plan] for plan in bench.runner.plans] == [
        ["a", "b"],
        ["a", "b"],
        ["c"],
        ["c"],
    ]


def test_a_request_stops_at_max_tokens(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", max_tokens=3))
    bench.run()
    assert len(bench.tokens("a")) == 3
    assert bench.final("a").finish_reason == "length"


def test_a_request_stops_at_the_end_of_the_context(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_model_len=10)
    bench.submit(stand_ins.a_request("a", 6, max_tokens=50))
    bench.run()
    assert len(bench.tokens("a")) == 4
    assert bench.final("a").finish_reason == "length"


def test_the_cache_bounds_the_context_too(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(num_blocks=4)
    bench.submit(stand_ins.a_request("a", 6, max_tokens=50), stand_ins.a_request("b", 12))
    bench.run()
    assert len(bench.tokens("a")) == 6
    assert bench.final("b").error_code == "context_length_exceeded"
    assert (
        bench.final("b").error_message
        == "the prompt has 12 tokens; the context holds 12, the answer's included"
    )


def test_a_stop_token_ends_a_request_and_is_named(stand_ins: ModuleType) -> None:
    request = stand_ins.a_request("a", max_tokens=8)
    tokens = stand_ins.tokens_alone(request)
    stop = tokens[2]
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", max_tokens=8, stop_token_ids=(stop,)))
    bench.run()
    assert bench.tokens("a") == tokens[: tokens.index(stop) + 1]
    final = bench.final("a")
    assert (final.finish_reason, final.stop_token_id, final.token_ids) == ("stop", stop, (stop,))


def test_no_stop_token_comes_before_min_tokens(stand_ins: ModuleType) -> None:
    stops = tuple(range(stand_ins.VOCAB_SIZE - 1))
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", max_tokens=8, min_tokens=3, stop_token_ids=stops))
    bench.run()
    assert bench.tokens("a")[:3] == [stand_ins.VOCAB_SIZE - 1] * 3
    assert bench.final("a").finish_reason == "stop"
    assert len(bench.tokens("a")) >= 4


def test_a_request_for_no_tokens_ends_after_its_prompt_with_its_scores(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench(max_num_batched_tokens=4)
    request = stand_ins.a_request("a", 10, max_tokens=0, prompt_logprobs=0)
    bench.submit(request)
    bench.run()
    final = bench.final("a")
    assert (final.finish_reason, final.token_ids, bench.events_of("a")) == ("length", (), [final])
    assert final.prompt_logprobs[0] is None
    assert [score.logprob for score in final.prompt_logprobs[1:]] == [-float(at) for at in range(1, 10)]
    bench.check_nothing_is_held()


def test_aborting_an_unknown_request_is_nothing(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.scheduler.abort("never seen")
    assert not bench.scheduler.has_work


def test_a_failed_row_ends_its_own_request_and_is_not_cached(stand_ins: ModuleType) -> None:
    def logits(sequence: Any, length: int) -> torch.Tensor:
        given = stand_ins.logits_of(sequence, length)
        return given * float("nan") if sequence.request_id == "bad" else given

    bench = stand_ins.a_bench(runner=stand_ins.ScriptedRunner(logits=logits))
    bench.submit(stand_ins.a_request("bad", range(10)), stand_ins.a_request("good", [4] * 3, max_tokens=2))
    bench.run()
    assert (bench.final("bad").finish_reason, bench.final("bad").error_code) == ("error", "invalid_logits")
    assert bench.tokens("good") == stand_ins.tokens_alone(stand_ins.a_request("good", [4] * 3, max_tokens=2))
    bench.submit(stand_ins.a_request("next", range(10), max_tokens=1))
    bench.run()
    assert bench.final("next").cached_tokens == 0


def test_a_failed_plan_ends_its_requests_and_leaves_the_waiting_ones(stand_ins: ModuleType) -> None:
    runner = stand_ins.ScriptedRunner(
        fails=lambda plan: any(c.sequence.request_id == "a" for c in plan.chunks)
    )
    bench = stand_ins.a_bench(max_num_seqs=2, runner=runner)
    bench.submit(*(stand_ins.a_request(name, 3, max_tokens=1) for name in "abc"))
    bench.run()
    assert [bench.final(name).finish_reason for name in "abc"] == ["error", "error", "length"]
    assert bench.final("b").error_message == "the device is on fire"
    bench.check_nothing_is_held()


@pytest.mark.parametrize(
    ("prompt", "options", "code"),
    [
        ([], {}, "invalid_request"),
        ([5, 10**6], {}, "invalid_request"),
        ([5, -1], {}, "invalid_request"),
        ([1] * 100, {}, "context_length_exceeded"),
        ([1] * 101, {"max_tokens": 0}, "context_length_exceeded"),
    ],
)
def test_what_can_never_run_is_refused(
    stand_ins: ModuleType, prompt: list[int], options: dict[str, Any], code: str
) -> None:
    bench = stand_ins.a_bench()
    request = stand_ins.a_request("a", 1, **options)
    bench.submit(Submit("a", prompt, request.sampling))
    bench.run()
    assert (bench.final("a").finish_reason, bench.final("a").error_code) == ("error", code)


def test_a_prompt_that_fills_the_context_can_be_scored(stand_ins: ModuleType) -> None:
    bench = stand_ins.a_bench()
    bench.submit(stand_ins.a_request("a", 100, max_tokens=0))
    bench.run()
    assert bench.final("a").finish_reason == "length"


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_of_nothing_are_refused(name: str) -> None:
    values = {"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
        SchedulerLimits(**values)
