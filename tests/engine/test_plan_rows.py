"""Where the rows of a step's plan lie, and what they are told to be."""

from __future__ import annotations

import pytest

from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.plan_rows import Kept, batch_of, scouting_batch, spans_of
from timbre_server.engine.sequence import ScheduledChunk, Sequence, StepPlan


@pytest.mark.parametrize(
    ("start", "num_tokens", "decodes"),
    [(0, 4, False), (3, 1, False), (4, 1, True), (4, 2, False), (2, 3, False)],
)
def test_rows_are_of_a_chunk_but_for_one_past_the_prompt(start: int, num_tokens: int, decodes: bool) -> None:
    """A prompt's one row is what is left of several; the base's own pass is told the same."""
    request = Submit("r", [1, 2, 3, 4], SamplingParams(), (AdapterUse("router", 1.0, scouts=True),))
    sequence = Sequence(request, [1, 2, 3, 4, 5, 6], 1)
    sequence.block_table, sequence.scout_table, sequence.num_computed_tokens = [1], [2], start
    chunk = ScheduledChunk(sequence, num_tokens)
    plan = StepPlan((chunk,))
    (span,) = spans_of(chunk, start)
    own, scouting = (each.sequences[0] for each in (batch_of(plan, [Kept(0, True)]), scouting_batch(plan)))
    assert [span.in_chunk, own.in_chunk, scouting.in_chunk] == 3 * [not decodes]
    assert (own.block_table, scouting.block_table) == ((1,), (2,))
