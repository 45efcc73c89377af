"""What a tape chooses, it knows again."""

from __future__ import annotations

import pytest
import torch

from timbre_server.native.recording import Recording
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, State, Tape

NUM_ROWS = 13


@pytest.mark.cpp
def test_what_was_chosen_for_a_state_is_known_when_it_comes_again() -> None:
    state, chosen = State(), list[int]()
    numbers = [State.another() for _ in range(Choice._MAX_KNOWN + 1)]
    sources = {number: torch.randn(NUM_ROWS, 4) for number in numbers}
    sums = torch.empty(NUM_ROWS, 4)

    def choose() -> Tape:
        chosen.append(state.number)
        source = sources[state.number]
        return Recording.of_kernels(lambda: sum_into(sums, source, source), NUM_ROWS)

    tape = Tape([Choice(state, choose)])

    def play(number: int) -> None:
        state.number = number
        tape(NUM_ROWS)
        assert torch.equal(sums, 2 * sources[number])

    for number in [*numbers[:-1], *numbers[:-1]]:
        play(number)
    assert chosen == numbers[:-1]
    play(numbers[-1])
    play(numbers[1])
    play(numbers[0])
    assert chosen == [*numbers, numbers[0]], "the first had to make room"
