"""What a request adds to or takes from the logits of its next token, before anything is drawn.

In this order: logit bias; repetition penalty (over prompt and output: a positive logit is divided by it, a
negative one multiplied, as CTRL and transformers have it); presence and frequency penalties (output only);
end tokens masked until ``min_tokens``. Token ids outside the vocabulary are passed over.

Legend: V vocabulary, M mentioned tokens.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from timbre_server.engine.messages import SamplingParams


def changes_logits(params: SamplingParams, num_output_tokens: int) -> bool:
    """Whether `adjust` would do anything."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.presence_penalty
        or params.frequency_penalty
        or (params.stop_token_ids and num_output_tokens < params.min_tokens)
    )


def adjust(logits_V: Tensor, params: SamplingParams, seen_ids: array[int], output_ids: Sequence[int]) -> None:
    """Apply a request's bias, penalties and mask to a row of float32 logits, in place.

    ``seen_ids``: the distinct tokens of prompt and output, 64 bits each; read for a repetition penalty alone.
    """
    size = logits_V.shape[0]
    if params.logit_bias:
        biased = {token: bias for token, bias in params.logit_bias.items() if 0 <= token < size}
        logits_V[_ids(biased, logits_V)] += logits_V.new_tensor(list(biased.values()))
    if params.repetition_penalty != 1.0 and seen_ids:
        seen_M = torch.frombuffer(seen_ids, dtype=torch.int64).to(logits_V.device, copy=True)
        value_M = logits_V[seen_M]
        penalty = params.repetition_penalty
        logits_V[seen_M] = torch.where(value_M < 0, value_M * penalty, value_M / penalty)
    if output_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(output_ids)
        count_M = logits_V.new_tensor(list(counts.values()))
        logits_V[_ids(counts, logits_V)] -= params.presence_penalty + params.frequency_penalty * count_M
    if len(output_ids) < params.min_tokens:
        ends = {token for token in params.stop_token_ids if 0 <= token < size}
        logits_V[_ids(ends, logits_V)] = float("-inf")


def _ids(tokens: Iterable[int], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
