"""How the rows of a step's plan lie in one batch, chunk after chunk.

Legend: T rows, S rows of chunks that scout, D hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, compress, pairwise

from timbre_server.engine.batch import Batch
from timbre_server.engine.paged_attention import SequenceRows
from timbre_server.engine.sequence import ScheduledChunk, StepPlan
from timbre_server.operators.row_table import Span


@dataclass(frozen=True, slots=True)
class Kept:
    """The last rows of one chunk, whose logits are kept: those that predict prompt tokens, then the last."""

    num_prompt_rows: int
    draws_token: bool

    @property
    def num_rows(self) -> int:
        return self.num_prompt_rows + int(self.draws_token)


def spans_of(chunk: ScheduledChunk, first: int) -> list[Span]:
    """A chunk's rows from position ``first`` on, cut where adapters begin to act or virtual tokens end."""
    sequence, num_virtual = chunk.sequence, chunk.sequence.num_virtual_tokens
    inner = {cut for cut in (num_virtual, *sequence.turns) if first < cut < chunk.end}
    return [
        Span(
            end - start,
            tuple(compress(sequence.adapter_slots, sequence.acting(start))),
            virtual_from=start if start < num_virtual else None,
            in_chunk=not chunk.decodes,
        )
        for start, end in pairwise(sorted({first, *inner, chunk.end}))
    ]


def kept_of(chunk: ScheduledChunk) -> Kept:
    """Row r of a sequence predicts token r + 1; prompt tokens are scored until the first token is drawn."""
    sequence = chunk.sequence
    scored = 0
    if sequence.request.sampling.prompt_logprobs is not None and sequence.num_output_tokens == 0:
        first = chunk.start + chunk.num_virtual
        scored = max(0, min(chunk.end, sequence.num_prompt_tokens - 1) - first)
    return Kept(scored, chunk.draws_token)


def batch_of(plan: StepPlan, kept: Sequence[Kept]) -> Batch:
    token_ids: list[int] = []
    sequences: list[SequenceRows] = []
    kept_rows: list[int] = []
    for chunk, keep in zip(plan.chunks, kept, strict=True):
        first = len(token_ids)
        sequence = chunk.sequence
        sequences.append(_rows_of(chunk, first, sequence.block_table))
        token_ids += sequence.token_ids[chunk.start : chunk.end]
        kept_rows += range(len(token_ids) - keep.num_rows, len(token_ids))
    return Batch(token_ids, sequences, kept_rows)


def scouting_rows(plan: StepPlan) -> list[int]:
    """The rows of the plan's chunks that scout, increasing."""
    ends = accumulate(chunk.num_tokens for chunk in plan.chunks)
    return [
        row
        for chunk, end in zip(plan.chunks, ends, strict=True)
        if chunk.sequence.scouts
        for row in range(end - chunk.num_tokens, end)
    ]


def scouting_batch(plan: StepPlan) -> Batch:
    """These rows for the base alone, over the blocks of its own pass."""
    token_ids: list[int] = []
    sequences: list[SequenceRows] = []
    for chunk in plan.chunks:
        sequence = chunk.sequence
        if sequence.scouts:
            sequences.append(_rows_of(chunk, len(token_ids), sequence.scout_table))
            token_ids += sequence.token_ids[chunk.start : chunk.end]
    return Batch(token_ids, sequences, ())


def _rows_of(chunk: ScheduledChunk, first: int, block_table: Sequence[int]) -> SequenceRows:
    return SequenceRows(first, chunk.num_tokens, chunk.start, tuple(block_table), not chunk.decodes)
