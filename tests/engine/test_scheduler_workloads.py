"""Random crowds of requests: whatever happens, each ends once, with the text that it gives alone."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from timbre_server.engine.messages import Submit

WORKLOADS = st.lists(
    st.fixed_dictionaries(
        {
            "wait": st.integers(0, 4),
            "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=24),
            "max_tokens": st.integers(0, 12),
            "mix": st.sampled_from(
                [
                    (),
                    (("x", 1.0),),
                    (("y", 0.5),),
                    (("x", 1.0), ("z", 0.5)),
                    (("bad", 1.0),),
                    (("prompt", 1.0, 5),),
                    (("x", 1.0, 0, 4),),
                    (("x", 1.0, 0, 6), ("z", 0.5, 0, 9)),
                ]
            ),
            "salt": st.sampled_from(["", "tenant"]),
            "temperature": st.sampled_from([0.0, 0.9]),
            "stop_token_ids": st.sampled_from([(), (3, 4, 5)]),
            "prompt_logprobs": st.sampled_from([None, None, 0]),
            "abort_after": st.sampled_from([None, None, None, 0, 2, 5]),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=60)
@given(
    workload=WORKLOADS,
    num_blocks=st.integers(11, 24),
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(1, 12),
    delay=st.integers(0, 3),
    capacity=st.integers(2, 3),
)
def test_every_request_ends_once_with_the_tokens_that_it_gives_alone(
    stand_ins: ModuleType,
    workload: list[dict[str, Any]],
    num_blocks: int,
    max_num_seqs: int,
    budget: int,
    delay: int,
    capacity: int,
) -> None:
    bench = stand_ins.a_bench(
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_skips=2,
        adapters=stand_ins.LoadingAdapters(capacity=capacity, delay=delay),
    )
    requests: list[tuple[Submit, int | None]] = []
    aborts: list[tuple[int, str]] = []
    for index, entry in enumerate(workload):
        options = dict(entry)
        abort_after, wait = options.pop("abort_after"), options.pop("wait")
        for _ in range(wait):
            bench.turn()
            for left, name in aborts:
                if left == len(bench.runner.plans):
                    bench.scheduler.abort(name)
        request = stand_ins.a_request(f"r{index}", options.pop("prompt"), seed=index, **options)
        bench.submit(request)
        requests.append((request, abort_after))
        if abort_after is not None:
            aborts.append((len(bench.runner.plans) + abort_after, request.request_id))
    bench.run(3000)
    bench.check_nothing_is_held()
    assert bench.adapters.most_in_use <= capacity
    for request, abort_after in requests:
        scores = [event.prompt_logprobs for event in bench.events_of(request.request_id)]
        told = [[score.token_id for score in each if score is not None] for each in scores if each]
        assert told in ([], [request.prompt_token_ids[1:]])
        final = bench.final(request.request_id)
        tokens = bench.tokens(request.request_id)
        if any(use.digest == "bad" for use in request.adapters):
            assert final.error_code == "adapter_load_failed" or final.finish_reason == "abort"
        elif final.finish_reason == "abort":
            assert abort_after is not None
            assert tokens == stand_ins.tokens_alone(request)[: len(tokens)]
        else:
            assert tokens == stand_ins.tokens_alone(request)
