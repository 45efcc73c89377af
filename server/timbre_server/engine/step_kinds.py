"""Which kind of step a model's attention runs in: the fastest that gives here what `PagedStep` gives.

Each kind is one file: `paged_attention` (plain PyTorch, everywhere), `native_attention` (C++, on a CPU) and
`varlen_attention` (PyTorch's kernel, on a GPU). Recorded steps (`decode_graphs`) have a kind of their own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from timbre_server.engine.context import AttentionCall, AttentionContext
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.native_attention import NUMBERS, NativeStep
from timbre_server.engine.paged_attention import PagedStep, SequenceRows
from timbre_server.engine.varlen_attention import VarlenStep
from timbre_server.native.library import LibraryUnavailable

_log = logging.getLogger(__name__)

_TOLERANCES = {True: 2e-2, False: 1e-4}
"""Of values around 1, by whether they have 16 bits."""
_CHECKED = ((21, 21), (1, 18), (1, 3), (6, 70), (1, 1))
"""Rows and keys of the sequences that `agrees` compares."""

SOFTCAP = 1.0
"""The one that is tried: scores around 1 show it."""


class Scores(NamedTuple):
    """What a layer does with its scores beside scaling them."""

    are_capped: bool = False
    have_sinks: bool = False


StepKind = Callable[[KVCache, Sequence[SequenceRows]], AttentionContext]


def step_for(cache: KVCache, shapes: Sequence[LayerShape], *, native: bool = False) -> StepKind:
    """The fastest kind of step that gives on this device what `PagedStep` gives.

    ``native``: C++ may be used on a CPU.
    """
    if native and cache.device.type == "cpu" and cache.dtype in NUMBERS:
        return _native_or_padded(cache, shapes)
    if cache.device.type != "cuda" or cache.dtype.itemsize != 2:
        return PagedStep
    try:
        agree = agrees(VarlenStep, cache, shapes)
    except TypeError:
        _log.info("attention: padded groups (PyTorch %s reads no block tables)", torch.__version__)
        return PagedStep
    except (RuntimeError, ValueError):  # No such kernel for this device.
        _log.warning("PyTorch's variable-length attention does not run here", exc_info=True)
        agree = False
    _log.info("attention: %s", "variable-length kernel" if agree else "padded groups")
    return VarlenStep if agree else PagedStep


def _native_or_padded(cache: KVCache, shapes: Sequence[LayerShape]) -> StepKind:
    try:
        why_not = "" if agrees(NativeStep, cache, shapes) else "C++ computes something else than PyTorch here"
    except LibraryUnavailable as error:
        why_not = str(error)
    if why_not:
        _log.warning("attention: padded groups (%s)", why_not)
        return PagedStep
    _log.info("attention: C++")
    return NativeStep


@torch.inference_mode()
def agrees(
    kind: StepKind,
    cache: KVCache,
    shapes: Sequence[LayerShape],
    checked: Sequence[tuple[int, int]] = _CHECKED,
    scores: Collection[Scores] = (Scores(),),
) -> bool:
    """Whether a kind of step computes what `PagedStep` does, with and without a window, with each of these
    ``scores``, for a cache of this block size, dtype and device. Works on a small cache of its own, with
    sequences of so many rows and keys as ``checked`` says."""
    size, tolerance = cache.block_size, _TOLERANCES[cache.dtype.itemsize == 2]
    sequences, first_row, next_block = [], 0, 1
    for num_rows, num_keys in checked:
        blocks = tuple(range(next_block, next_block + -(-num_keys // size)))
        sequences.append(SequenceRows(first_row, num_rows, num_keys - num_rows, blocks))
        first_row, next_block = first_row + num_rows, next_block + len(blocks)
    own = KVCache(shapes, num_blocks=next_block, block_size=size, dtype=cache.dtype, device=cache.device)
    for shape in {(s.num_kv_heads, s.key_dim, s.value_dim): s for s in shapes}.values():
        for pool in own.pools(shape.layer):
            pool.normal_()
        for window, each_scores in product((None, 5), scores):
            call = _random_call(shape, first_row, window, each_scores, own)
            got, want = (each(own, sequences).attend(call) for each in (kind, PagedStep))
            if not torch.allclose(got.float(), want.float(), atol=tolerance, rtol=tolerance):
                return False
    return True


def _random_call(
    shape: LayerShape, num_rows: int, window: int | None, scores: Scores, cache: KVCache
) -> AttentionCall:
    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=cache.dtype, device=cache.device)

    heads = shape.num_kv_heads
    return AttentionCall(
        shape.layer,
        random(2 * heads, num_rows, shape.key_dim),
        random(heads, num_rows, shape.key_dim),
        random(heads, num_rows, shape.value_dim),
        scale=shape.key_dim**-0.5,
        window=window,
        softcap=SOFTCAP if scores.are_capped else None,
        sinks_H=random(2 * heads) if scores.have_sinks else None,
    )
