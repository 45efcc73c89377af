"""Who goes first and who gives way: pure functions on sequences. `scheduler` does what they say."""

from __future__ import annotations

from collections.abc import Iterable

from timbre_server.engine.sequence import Sequence


def num_tokens_left(sequence: Sequence) -> int:
    """Tokens whose KV entries are still to be computed; 1 while decoding."""
    return len(sequence.token_ids) - sequence.num_computed_tokens


def num_tokens_within(sequence: Sequence, num_rows: int) -> int:
    """Tokens that fit in ``num_rows`` > 0 rows of a step; one in any case, or it would never get on."""
    return min(num_tokens_left(sequence), max(1, num_rows // sequence.row_copies))


def running_order(running: Iterable[Sequence]) -> list[Sequence]:
    """Decodes before prefill chunks, each in order of arrival: a long prompt never delays a stream."""
    return sorted(running, key=lambda sequence: (num_tokens_left(sequence) > 1, sequence.arrival))


def victim(running: Iterable[Sequence]) -> Sequence:
    """Who gives its blocks back when they run out: the latest to arrive, so the oldest always gets on."""
    return max(running, key=lambda sequence: sequence.arrival)


def has_room(num_needed: int, num_free: int, num_growing: int) -> bool:
    """Whether a waiting sequence's blocks may be taken: one stays for each table of the running sequences'
    next tokens, so that an admission does not at once preempt somebody (or itself, again and again)."""
    return num_needed + num_growing <= num_free


def is_held_back(sequence: Sequence, most_skips: int, max_skips: int) -> bool:
    """Whether a sequence must wait for one before it in the queue that waits for an adapter, and of which
    the most often passed over has let ``most_skips`` go first.

    Waiting for an adapter holds nobody back until ``max_skips`` later requests were admitted. From then
    on no later request with adapters is: those in use may fill the memory that the first one needs. Base
    requests hold no adapter memory, so they always pass.
    """
    return bool(sequence.mix) and most_skips >= max_skips
