"""Tokens from logits: `SamplingParams` made true, in the order that it documents.

Every row is drawn with one uniform number that depends only on the request's seed and on how many tokens
it has put out, so a request's text does not depend on its neighbours and survives preemption. Rows of like
kind go through `draw` together; a row whose logits are not finite numbers fails alone.

Legend: T rows, N rows of a kind, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_server.engine.draw import Truncation, draw, greedy, ranked, truncate, weights
from timbre_server.engine.messages import SamplingParams, TokenLogprobs
from timbre_server.engine.penalties import adjust, changes_logits
from timbre_server.engine.sequence import ChunkResult

LOWEST_LOGPROB = -9999.0
"""Told in place of minus infinity, which JSON does not have."""
ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What a row's next token depends on beside its logits."""

    params: SamplingParams
    seen_token_ids: array[int]
    """The distinct ones of prompt and output; only for a repetition penalty."""
    output_token_ids: Sequence[int]


def sample(logits_TV: Tensor, rows: Sequence[SamplingRow]) -> list[ChunkResult]:
    """One token a row, with log-probabilities where asked. Any float dtype; the logits stay as they are."""
    raw_TV = logits_TV.float()
    if not rows:
        return []
    adjusted_TV = _adjusted(raw_TV, rows)
    best_T, token_T = greedy(adjusted_TV)
    highest = best_T.tolist()
    is_sound = [math.isfinite(best) for best in highest]
    _draw_rows(adjusted_TV, best_T, token_T, rows, is_sound)
    results = [
        ChunkResult(token_id=token) if math.isfinite(best) else ChunkResult(error_message=_unsound(best))
        for token, best in zip(token_T.tolist(), highest, strict=True)
    ]
    _add_logprobs(raw_TV, rows, results)
    return results


def prompt_logprobs(logits_NV: Tensor, next_token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """For each row: how likely the token was that did follow, and the ``num_top`` (-1: all) likeliest."""
    found: list[TokenLogprobs] = []
    for start in range(0, len(next_token_ids), ROWS_AT_ONCE):
        part = next_token_ids[start : start + ROWS_AT_ONCE]
        found += _token_logprobs(logits_NV[start : start + len(part)].float(), part, num_top)
    return found


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) for output token ``index`` of a request: a counter-based generator, no state."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _adjusted(raw_TV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    changed = [at for at, row in enumerate(rows) if changes_logits(row.params, len(row.output_token_ids))]
    if not changed:
        return raw_TV
    adjusted_TV = raw_TV.clone()
    for at in changed:
        row = rows[at]
        adjust(adjusted_TV[at], row.params, row.seen_token_ids, row.output_token_ids)
    return adjusted_TV


def _draw_rows(
    logits_TV: Tensor, best_T: Tensor, token_T: Tensor, rows: Sequence[SamplingRow], is_sound: Sequence[bool]
) -> None:
    """Put the drawn tokens of all rows that are not greedy into ``token_T``."""
    drawn = [at for at, row in enumerate(rows) if is_sound[at] and row.params.temperature > 0]
    whole = [at for at in drawn if not _is_truncated(rows[at].params)]
    truncated = [at for at in drawn if _is_truncated(rows[at].params)]
    if whole:
        at_N, weight_NV, uniform_N = _weights_of(whole, logits_TV, best_T, rows)
        token_T[at_N] = draw(weight_NV, uniform_N)
    if truncated:
        at_N, weight_NV, uniform_N = _weights_of(truncated, logits_TV, best_T, rows)
        params = [rows[at].params for at in truncated]
        cut = Truncation(
            torch.tensor([each.top_k for each in params], device=logits_TV.device),
            torch.tensor([each.top_p for each in params], dtype=torch.float64, device=logits_TV.device),
            torch.tensor([each.min_p for each in params], device=logits_TV.device),
        )
        truncate(weight_NV, cut)
        token_T[at_N] = draw(weight_NV, uniform_N)


def _weights_of(
    chosen: Sequence[int], logits_TV: Tensor, best_T: Tensor, rows: Sequence[SamplingRow]
) -> tuple[Tensor, Tensor, Tensor]:
    device = logits_TV.device
    at_N = torch.tensor(chosen, device=device)
    temperature_N = torch.tensor([rows[at].params.temperature for at in chosen], device=device)
    numbers = [uniform(rows[at].params.seed, len(rows[at].output_token_ids)) for at in chosen]
    logits_NV = logits_TV if len(chosen) == len(rows) else logits_TV[at_N]
    weight_NV = weights(logits_NV, best_T[at_N], temperature_N)
    return at_N, weight_NV, torch.tensor(numbers, dtype=torch.float64, device=device)


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _unsound(best: float) -> str:
    if math.isnan(best):
        return "the model's logits are not numbers (NaN); the adapter's weights may be too large"
    if best > 0:
        return "the model's logits are infinite; the adapter's weights may be too large"
    return "no token is left to draw from: bias and masks exclude the whole vocabulary"


def _add_logprobs(raw_TV: Tensor, rows: Sequence[SamplingRow], results: Sequence[ChunkResult]) -> None:
    by_count: dict[int, list[int]] = {}
    for at, (row, result) in enumerate(zip(rows, results, strict=True)):
        if row.params.logprobs is not None and result.token_id is not None:
            by_count.setdefault(row.params.logprobs, []).append(at)
    for num_top, chosen in by_count.items():
        tokens = [token for at in chosen if (token := results[at].token_id) is not None]
        for at, found in zip(chosen, _token_logprobs(raw_TV[chosen], tokens, num_top), strict=True):
            results[at].logprobs = found


def _token_logprobs(logits_NV: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    token_N1 = torch.tensor(token_ids, device=logits_NV.device)[:, None]
    # One by one: PyTorch's threads share a lone row, and add it up in another order than one of several.
    mass_N1 = torch.stack([row_V.logsumexp(0) for row_V in logits_NV])[:, None]
    value_N1 = logits_NV.gather(1, token_N1)
    chosen = (value_N1 - mass_N1).clamp_min(LOWEST_LOGPROB)[:, 0].tolist()
    ranks = torch.stack(
        [
            _rank(row_V, token, value)
            for row_V, token, value in zip(logits_NV, token_ids, value_N1, strict=True)
        ]
    ).tolist()
    tops = _tops(logits_NV, mass_N1, logits_NV.shape[1] if num_top < 0 else num_top)
    return [TokenLogprobs(*each) for each in zip(token_ids, chosen, ranks, tops, strict=True)]


def _rank(logits_V: Tensor, token: int, value: Tensor) -> Tensor:
    """1 for the likeliest; of equals the lower token id comes first."""
    num_before = torch.count_nonzero(logits_V[:token] >= value)
    return num_before + torch.count_nonzero(logits_V[token:] > value) + 1


def _tops(logits_NV: Tensor, mass_N1: Tensor, num_top: int) -> list[tuple[tuple[int, float], ...]]:
    if num_top == 0:
        return [()] * logits_NV.shape[0]
    count = min(num_top, logits_NV.shape[1])
    floor_N1 = logits_NV.topk(count, dim=1).values[:, -1:]
    value_NC, id_NC, _ = ranked(logits_NV, logits_NV >= floor_N1)
    logprobs = (value_NC[:, :count] - mass_N1).clamp_min(LOWEST_LOGPROB).tolist()
    return [
        tuple(zip(ids, row, strict=True))
        for ids, row in zip(id_NC[:, :count].tolist(), logprobs, strict=True)
    ]
