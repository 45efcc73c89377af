"""Times that the tally takes from the engine's messages: between tokens, and before the first one."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from timbre_server.engine.messages import StepOutput, StepStats, TokenEvent
from timbre_server.request_record import RequestRecord
from timbre_server.tally import Tally

MODEL = ("tiny", "0")
RECORD = RequestRecord(
    request_id="r", adapters=(), arrived_s=100.0, first_token_s=105.0, finished_s=109.0, prompt_tokens=7,
    cached_tokens=4, generation_tokens=5, max_tokens=16, n=1, finish_reason="stop",
)  # fmt: skip


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def a_tally() -> tuple[Tally, Clock]:
    clock = Clock()
    return Tally("tiny", 256, clock=clock), clock


def test_gaps_between_tokens_are_taken_within_a_sequence() -> None:
    tally, clock = a_tally()
    for second, request_id in ((0, "a"), (1, "b"), (3, "a"), (4, "b"), (4.5, "b")):
        clock.now = 100.0 + second
        tally.on_output(StepOutput(StepStats(), (TokenEvent(request_id, token_ids=(1,)),)))
    tally.on_output(StepOutput(StepStats(), (TokenEvent("a", finish_reason="abort"),)))
    tally.on_output(StepOutput(StepStats(), (TokenEvent("a", token_ids=(1,)),)))
    gaps = tally.histograms["vllm:inter_token_latency_seconds"].at(MODEL)
    assert (gaps.cumulative()[-1], gaps.total) == (("+Inf", 3), 6.5)


def test_a_sequence_waits_until_its_first_step_and_not_until_a_second_start() -> None:
    tally, clock = a_tally()
    for now, started in ((103.0, ("r",)), (104.0, ("r", "still there"))):
        clock.now = now
        tally.on_output(StepOutput(StepStats(step_seconds=1.0), started=started))
    tally.on_finished(RECORD)
    times = [
        tally.histograms[f"vllm:request_{part}_time_seconds"].at(MODEL).total
        for part in ("queue", "prefill", "decode", "inference")
    ]
    assert times == [2.0, 3.0, 4.0, 7.0]


def test_the_oldest_wait_is_that_of_who_has_not_begun() -> None:
    assert Tally("tiny", 256, clock=count(100.0).__next__).oldest_wait_s() == 0
    tally, clock = a_tally()
    for now, request_id in ((100.0, "a"), (102.0, "b"), (103.0, "c")):
        clock.now = now
        tally.on_submitted(request_id)
    clock.now = 110.0
    assert tally.oldest_wait_s() == 10.0
    tally.on_output(StepOutput(StepStats(step_seconds=1.0), started=("a",)))
    assert tally.oldest_wait_s() == 8.0
    for request_id in ("b", "c"):
        tally.on_finished(replace(RECORD, request_id=request_id, finish_reason="abort"))
    assert tally.oldest_wait_s() == 0


def test_a_client_that_leaves_is_counted_by_what_its_sequence_was_at() -> None:
    tally, _ = a_tally()
    left = replace(RECORD, finish_reason="abort")
    tally.on_finished(replace(left, request_id="queued", first_token_s=None))
    tally.on_output(StepOutput(StepStats(step_seconds=1.0), started=("prefill", "decode", "whole")))
    tally.on_finished(replace(left, request_id="prefill", first_token_s=None))
    tally.on_finished(replace(left, request_id="decode"))
    tally.on_finished(replace(RECORD, request_id="whole"))
    counts = dict(tally.counters["timbre_cancelled"].items())
    assert counts == {("queued",): 1, ("prefill",): 1, ("decode",): 1}


def test_prompts_that_never_ran_are_not_counted() -> None:
    tally, _ = a_tally()
    waited = replace(RECORD, first_token_s=None, generation_tokens=0, adapters=("pirate",))
    tally.on_finished(replace(waited, finish_reason="abort"))
    tally.on_finished(replace(waited, finish_reason="error"))
    tally.on_output(StepOutput(StepStats(step_seconds=1.0, prompt_tokens=14)))
    tally.on_finished(replace(waited, finish_reason="length"))
    tally.on_finished(replace(RECORD, adapters=("pirate",)))
    assert dict(tally.counters["vllm:prompt_tokens"].items()) == {MODEL: 14}
    columns = [dict(tally.adapters.column(index)) for index in range(3)]
    assert [column["pirate"] for column in columns] == [4.0, 14.0, 5.0]
