"""Who goes first, who gives way."""

from __future__ import annotations

import pytest

from timbre_server.engine import policy
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.sequence import Sequence


def a_sequence(arrival: int, *, left: int = 1, mix: tuple[tuple[str, float], ...] = ()) -> Sequence:
    request = Submit(f"r{arrival}", [1] * 8, SamplingParams())
    sequence = Sequence(request, [1] * 8, arrival, num_computed_tokens=8 - left)
    sequence.mix = mix
    return sequence


def test_decodes_go_before_prefills_and_each_in_order_of_arrival() -> None:
    running = [a_sequence(3, left=5), a_sequence(4), a_sequence(1, left=2), a_sequence(2)]
    assert [sequence.arrival for sequence in policy.running_order(running)] == [2, 4, 1, 3]


@pytest.mark.parametrize(
    ("left", "copies", "rows", "expected"),
    [(9, 1, 8, 8), (3, 1, 8, 3), (9, 4, 8, 2), (9, 3, 8, 2), (9, 16, 8, 1)],
)
def test_a_budget_counts_each_copy_of_a_row_and_lets_one_token_run(
    left: int, copies: int, rows: int, expected: int
) -> None:
    uses = (AdapterUse("a", row_copies=copies), AdapterUse("b"))
    sequence = Sequence(
        Submit("r", [1] * 9, SamplingParams(), uses), [1] * 9, 1, num_computed_tokens=9 - left
    )
    assert policy.num_tokens_within(sequence, rows) == expected


def test_the_latest_to_arrive_gives_way() -> None:
    assert policy.victim([a_sequence(2), a_sequence(7), a_sequence(4)]).arrival == 7


@pytest.mark.parametrize(
    ("needed", "free", "running", "expected"), [(4, 4, 0, True), (4, 4, 1, False), (3, 4, 1, True)]
)
def test_one_free_block_stays_for_each_running_sequence(
    needed: int, free: int, running: int, expected: bool
) -> None:
    assert policy.has_room(needed, free, running) is expected


def test_waiting_for_an_adapter_holds_nobody_back_at_first() -> None:
    assert not policy.is_held_back(a_sequence(2, mix=(("b", 1.0),)), most_skips=2, max_skips=3)


def test_who_was_passed_over_too_often_holds_back_later_adapter_requests_but_no_base_requests() -> None:
    assert policy.is_held_back(a_sequence(2, mix=(("b", 1.0),)), most_skips=3, max_skips=3)
    assert not policy.is_held_back(a_sequence(3), most_skips=3, max_skips=3)
