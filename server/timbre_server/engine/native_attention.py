"""A step whose single rows are attended in C++ (``attention.cpp``), on a CPU.

`paged_attention` copies the keys and values of a length group before its product; here they are read where
they lie, row by row, without padding, in float32 whatever the cache's type. Chunks of several rows, soft
caps, sinks, and heads whose sizes are no multiple of eight are left to `paged_attention`, whose meaning
this is. It is used only where `step_kinds.step_for` found at start that the two agree.

Legend: T rows, H query heads, D key dim, E value dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.paged_attention import PagedStep, SequenceRows, needs_exact, visible_keys
from timbre_server.native.library import library, num_threads

NUMBERS = {torch.float32: "timbre_attention_float32", torch.bfloat16: "timbre_attention_bfloat16"}
"""The kernel for each type of cache."""
_LANES = 8


class _Row(ctypes.Structure):
    """``AttentionRow`` of ``attention.cpp``."""

    _fields_ = [("row", ctypes.c_int64), ("slots", ctypes.c_void_p), ("count", ctypes.c_int64)]


class _Shape(ctypes.Structure):
    """``AttentionShape`` of ``attention.cpp``."""

    _fields_ = [
        ("kv_heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("q_row_stride", ctypes.c_int64),
        ("q_head_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


@dataclass(frozen=True, slots=True)
class _Visible:
    """What single rows see under one window."""

    rows: ctypes.Array[_Row]
    num_keys: int


class NativeStep(PagedStep):
    """A `PagedStep` whose single rows are the kernel's; it holds the slots that the kernel is pointed to."""

    def __init__(self, cache: KVCache, sequences: Sequence[SequenceRows]) -> None:
        super().__init__(cache, sequences)
        self._run = getattr(library(), NUMBERS[cache.dtype])
        self._visible_by_window: dict[int | None, _Visible] = {}

    def _attend_singles(self, call: AttentionCall, q_THD: Tensor, out_THE: Tensor) -> None:
        key_dim, value_dim = call.k_GTD.shape[2], call.v_GTE.shape[2]
        if needs_exact(call) or key_dim % _LANES or value_dim % _LANES:
            super()._attend_singles(call, q_THD, out_THE)
            return
        q_THD = q_THD if q_THD.stride(2) == 1 else q_THD.contiguous()
        kv_heads, heads = call.k_GTD.shape[0], q_THD.shape[1]
        row_stride, head_stride, _ = q_THD.stride()
        visible = self._visible(call.window)
        keys, values = self._cache.pools(call.layer)
        self._run(
            ctypes.byref(
                _Shape(kv_heads, heads // kv_heads, key_dim, value_dim, row_stride, head_stride, call.scale)
            ),
            visible.rows,
            ctypes.c_int64(len(visible.rows)),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (q_THD, keys, values, out_THE)),
            num_threads(visible.num_keys * heads * (key_dim + value_dim)),
        )

    def _visible(self, window: int | None) -> _Visible:
        found = self._visible_by_window.get(window)
        if found is None:
            rows = []
            for single in reversed(self._singles):  # The longest first: threads end together.
                count = visible_keys(single, window)
                slots = self._slots[single.first_row]
                hidden = (single.end - count) * slots.itemsize
                rows.append(_Row(single.first_row, slots.data_ptr() + hidden, count))
            found = _Visible((_Row * len(rows))(*rows), sum(row.count for row in rows))
            self._visible_by_window[window] = found
        return found
