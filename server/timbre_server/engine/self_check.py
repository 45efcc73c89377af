"""A start-up check that our attention and cache compute what the model itself computes.

`plain_logits` runs two short sequences through the model as transformers ships it, before our attention is
installed; `check_against` runs them again flattened together, in uneven chunks, over the paged cache. It
catches what neither the configuration nor the probe shows. About a second on small models.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from timbre_server.engine.batch import Batch, forward
from timbre_server.engine.deny_list import family_name
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import SequenceRows
from timbre_server.errors import UnsupportedModel

_LENGTHS = (13, 9)
_STEPS = ((5, 3), (1, 4), (7, 1), (0, 1))
"""Rows of each sequence in each step: chunks from scratch, chunks on a cached prefix, single rows."""
_BLOCK_SIZE = 4
_BLOCK_TABLES = ((7, 2, 5, 1), (4, 8, 3))
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.4}
"""Of the logits' spread. A wrong pattern or position differs by about the spread itself. Rounding alone,
through thirty bfloat16 layers, differs by an eighth of it; more where a processor adds in other orders."""


def plain_logits(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Logits [T, V] of the check's sequences, each alone, with whatever attention the model has now."""
    with torch.inference_mode():
        return tuple(_alone(model, token_ids) for token_ids in _sequences(model))


def check_against(expected: Sequence[Tensor], model: PreTrainedModel, shapes: Sequence[LayerShape]) -> None:
    """Raises `UnsupportedModel` where the paged logits differ from ``expected`` by more than rounding."""
    cache = KVCache(
        shapes,
        num_blocks=1 + max(max(table) for table in _BLOCK_TABLES),
        block_size=_BLOCK_SIZE,
        dtype=model.dtype,
        device=model.device,
    )
    for index, (want_TV, got_TV) in enumerate(zip(expected, _paged_logits(model, cache), strict=True)):
        error = _relative_error(got_TV, want_TV)
        tolerance = _TOLERANCE[model.dtype]
        if not error <= tolerance:
            raise UnsupportedModel(
                f"{family_name(model.config)}: the start-up self-check failed. Logits over the paged cache "
                f"differ from the model's own by {error:.2g} of their spread in sequence {index}, expected "
                f"at most {tolerance:g} in {model.dtype}. This model cannot be served correctly."
            )


def _alone(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    ids_1T = torch.tensor([token_ids], dtype=torch.int64, device=model.device)
    logits_TV: Tensor = model(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=False
    ).logits[0]
    return logits_TV.float()


def _sequences(model: PreTrainedModel) -> list[list[int]]:
    vocab_size = int(model.config.get_text_config().vocab_size)
    return [[(31 * i * i + 17 * i + 101 * n + 5) % vocab_size for i in range(n)] for n in _LENGTHS]


def _paged_logits(model: PreTrainedModel, cache: KVCache) -> list[Tensor]:
    sequences = _sequences(model)
    computed = [0, 0]
    pieces: list[list[Tensor]] = [[], []]
    for step in _STEPS:
        rows: list[SequenceRows] = []
        token_ids: list[int] = []
        for index, count in enumerate(step):
            if count:
                start = computed[index]
                rows.append(SequenceRows(len(token_ids), count, start, _BLOCK_TABLES[index]))
                token_ids += sequences[index][start : start + count]
        with torch.inference_mode():
            logits_TV = forward(model, cache, Batch(token_ids, rows, range(len(token_ids))))
        first = 0
        for index, count in enumerate(step):
            pieces[index].append(logits_TV[first : first + count])
            first += count
            computed[index] += count
    return [torch.cat(piece) for piece in pieces]


def _relative_error(got_TV: Tensor, want_TV: Tensor) -> float:
    """Root mean square of the difference over that of the expected logits around their mean, worst row."""
    spread_T = (want_TV - want_TV.mean(dim=1, keepdim=True)).square().mean(dim=1).sqrt()
    error_T = (got_TV - want_TV).square().mean(dim=1).sqrt()
    return float((error_T / spread_T.clamp_min(1e-6)).max())
