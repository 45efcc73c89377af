"""What a sequence keeps of its own tokens."""

from __future__ import annotations

from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.sequence import Sequence, first_tokens

PROMPT = [5, 3, 5, 9]


def a_sequence(virtual_tokens: int = 0) -> Sequence:
    uses = (AdapterUse("a", virtual_tokens=virtual_tokens),) if virtual_tokens else ()
    request = Submit("r", PROMPT, SamplingParams(), uses)
    return Sequence(request, first_tokens(request), 1)


def test_seen_tokens_are_the_distinct_ones_of_prompt_and_output() -> None:
    sequence = a_sequence()
    assert list(sequence.seen_ids()) == [5, 3, 9]
    sequence.token_ids += [3, 7]
    assert list(sequence.seen_ids()) == [5, 3, 9, 7]
    sequence.token_ids += [7]
    assert list(sequence.seen_ids()) == [5, 3, 9, 7]


def test_virtual_tokens_are_not_seen() -> None:
    assert list(a_sequence(virtual_tokens=3).seen_ids()) == [5, 3, 9]


def test_each_token_is_looked_at_once() -> None:
    sequence = a_sequence()
    seen = sequence.seen_ids()
    sequence.token_ids[:] = [60, 61, 62, 63, 64]
    assert sequence.seen_ids() is seen
    assert list(seen) == [5, 3, 9, 64]
