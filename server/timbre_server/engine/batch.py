"""One forward pass over the flattened rows of several sequences.

The model sees a batch of 1 with all rows one after another; positions, cache slots and what each row may
see come from `paged_attention.PagedStep`. Knows nothing of requests, sampling or adapters.

Legend: T rows, N kept rows, V vocabulary, D hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from timbre_server.engine.context import AttentionContext, active
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.paged_attention import PagedStep, SequenceRows
from timbre_server.engine.prompted_attention import AttentionPrompts, PromptedAttention
from timbre_server.engine.step_kinds import StepKind


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows in order: the token of each, the sequences they belong to, and the rows whose logits are kept."""

    token_ids: Sequence[int]
    sequences: Sequence[SequenceRows]
    kept_rows: Sequence[int]

    @property
    def is_decode(self) -> bool:
        """Whether there is one row for each sequence, and all are kept."""
        return len(self.token_ids) == len(self.kept_rows) == len(self.sequences)


def forward(
    model: PreTrainedModel,
    cache: KVCache,
    batch: Batch,
    prompts: AttentionPrompts | None = None,
    step: StepKind = PagedStep,
) -> Tensor:
    """Logits [N, V] of the kept rows, float32; the rows' keys and values are in the cache afterwards.

    Call it under ``torch.inference_mode()``.
    """
    positions = [p for rows in batch.sequences for p in range(rows.start, rows.end)]
    context: AttentionContext = step(cache, batch.sequences)
    if prompts is not None:
        context = PromptedAttention(context, prompts)
    return run_model(model, context, batch.token_ids, positions, batch.kept_rows)


def hidden_states(model: PreTrainedModel, cache: KVCache, batch: Batch) -> Tensor:
    """What the model's last norm gives for each row [T, D], in its dtype; keys and values as by `forward`.

    Call it under ``torch.inference_mode()``, and with no adapter's rows set where the base alone is meant.
    """
    positions = [p for rows in batch.sequences for p in range(rows.start, rows.end)]
    with active(PagedStep(cache, batch.sequences)):
        output = model.base_model(
            input_ids=torch.tensor([batch.token_ids], dtype=torch.int64, device=model.device),
            position_ids=torch.tensor([positions], dtype=torch.int64, device=model.device),
            use_cache=False,
        )
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def run_model(
    model: PreTrainedModel,
    context: AttentionContext,
    token_ids: Sequence[int],
    positions: Sequence[int],
    kept_rows: Sequence[int],
) -> Tensor:
    """The model on one flattened batch, its attention answered by ``context``: logits [N, V], float32."""
    device = model.device
    tokens_1T = torch.tensor([token_ids], device=device)
    positions_1T = torch.tensor([positions], device=device)
    kept_rows_N = torch.tensor(kept_rows, dtype=torch.int64, device=device)  # There may be none.
    return run_rows(model, context, tokens_1T, positions_1T, kept_rows_N)


def run_rows(
    model: PreTrainedModel,
    context: AttentionContext,
    tokens_1T: Tensor,
    positions_1T: Tensor,
    kept_rows_N: Tensor | int = 0,
) -> Tensor:
    """`run_model` of int64 tensors on the model's device; 0 keeps all rows."""
    with active(context):
        output = model(
            input_ids=tokens_1T, position_ids=positions_1T, logits_to_keep=kept_rows_N, use_cache=False
        )
    logits_NV: Tensor = output.logits[0].float()
    return logits_NV
