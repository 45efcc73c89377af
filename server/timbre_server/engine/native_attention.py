"""A step that is attended in C++ (``attention.cpp``), on a CPU.

`paged_attention` copies the keys and values of single rows, and takes chunks one by one with what is masked;
here all are read where they lie, without padding, as far as a row sees, and summed in float32 whatever the
cache's type; of chunks in bfloat16 the matrix unit, where there is one, makes the products, for which their
weights are rounded. The step's keys and values are stored by the same call. Soft caps, sinks, and heads whose
sizes are no multiple of eight are left to `paged_attention`, whose meaning this is. It is used only where
`step_kinds.step_for` found at start that the two agree.

Legend: T rows, H query heads, D key dim, E value dim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.paged_attention import PagedStep, SequenceRows, needs_exact
from timbre_server.native.library import ADDRESS, NUMBER, REAL, kernel, least_count
from timbre_server.native.rows import NotRepeatable

NUMBERS = {torch.float32: "timbre_attention_float32", torch.bfloat16: "timbre_attention_bfloat16"}
"""The kernel for each type of cache."""
_LANES = 8
_NO_WINDOW = 2**31 - 1


class _Sequence(ctypes.Structure):
    """``Sequence`` of ``attention.h``."""

    _fields_ = [("first_row", NUMBER), ("num_rows", NUMBER), ("start", NUMBER), ("slots", ADDRESS)]


class _Heads(ctypes.Structure):
    """``Heads`` of ``attention.h``."""

    _fields_ = [("first", ADDRESS), ("row_stride", NUMBER), ("head_stride", NUMBER)]

    @staticmethod
    def of(x_HTD: Tensor) -> _Heads:
        head_stride, row_stride, _ = x_HTD.stride()
        return _Heads(x_HTD.data_ptr(), row_stride, head_stride)


class _StepRows(ctypes.Structure):
    """``StepRows`` of ``attention.h``."""

    _fields_ = [
        ("singles", ADDRESS),
        ("chunks", ADDRESS),
        ("num_singles", NUMBER),
        ("num_chunks", NUMBER),
        ("slots", ADDRESS),
        ("num_rows", NUMBER),
    ]


class _Attention(ctypes.Structure):
    """``Attention`` of ``attention.h``."""

    _fields_ = [
        ("rows", ADDRESS),
        ("q", _Heads),
        ("k", _Heads),
        ("v", _Heads),
        ("keys", ADDRESS),
        ("values", ADDRESS),
        ("out", ADDRESS),
        ("kv_heads", NUMBER),
        ("group", NUMBER),
        ("key_dim", NUMBER),
        ("value_dim", NUMBER),
        ("window", NUMBER),
        ("least_pairs", NUMBER),
        ("scale", REAL),
    ]


class NativeStep(PagedStep):
    """A `PagedStep` whose products are the kernel's; it holds the slots that the kernel is pointed to.

    Rows of a prompt have the bits of a chunk wherever steps cut it, were there but one left.
    """

    def __init__(self, cache: KVCache, sequences: Sequence[SequenceRows]) -> None:
        super().__init__(cache, sequences)
        self._run = kernel(NUMBERS[cache.dtype], ADDRESS)
        singles = self._sequences([s for s in sequences if _is_single(s)])
        chunks = self._sequences([s for s in sequences if not _is_single(s)])
        addresses, counts = map(ctypes.addressof, (singles, chunks)), (len(singles), len(chunks))
        self.rows = _StepRows(*addresses, *counts, self._slots_T.data_ptr(), len(self._slots_T))
        """What the kernel is told, for as long as the step lives."""
        self._held = singles, chunks

    def _sequences(self, sequences: Sequence[SequenceRows]) -> ctypes.Array[_Sequence]:
        longest_first = sorted(sequences, key=lambda s: s.end, reverse=True)  # Threads end together.
        slots = [self._slots[s.first_row].data_ptr() for s in longest_first]
        found = [
            _Sequence(s.first_row, s.num_rows, s.start, first)
            for s, first in zip(longest_first, slots, strict=True)
        ]
        return (_Sequence * len(found))(*found)

    def attend(self, call: AttentionCall) -> Tensor:
        if not _is_known(call, self._cache):
            return super().attend(call)
        call = _readable(call)
        attention, out_THE = _attention(self._cache, self.rows, call)
        self._run(ctypes.addressof(attention), torch.get_num_threads())
        return out_THE


def _is_single(sequence: SequenceRows) -> bool:
    return sequence.num_rows == 1 and not sequence.in_chunk


class PlayedSteps:
    """The context of steps that are written down and played, for any sequences."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._run = kernel(NUMBERS[cache.dtype], ADDRESS)
        self._rows = _StepRows()
        self._step: NativeStep | None = None
        self._calls: list[_Attention] = []
        """What the kernel is told, layer by layer."""

    def begin(self, step: NativeStep) -> None:
        """What is played next is this step, which is kept: the kernel reads what is its."""
        self._step = step
        ctypes.memmove(ctypes.addressof(self._rows), ctypes.addressof(step.rows), ctypes.sizeof(_StepRows))

    def attend(self, call: AttentionCall) -> Tensor:
        if not _is_known(call, self._cache):
            raise NotRepeatable("attention that C++ does not compute")
        attention, out_THE = _attention(self._cache, self._rows, _readable(call))
        self._calls.append(attention)
        self._run(ctypes.addressof(attention), torch.get_num_threads())
        return out_THE


def _attention(cache: KVCache, rows: _StepRows, call: AttentionCall) -> tuple[_Attention, Tensor]:
    """What the kernel is told of a call that is `_readable`, and that the caller keeps; and where it puts its
    output."""
    heads, num_rows, key_dim = call.q_HTD.shape
    kv_heads, value_dim = call.k_GTD.shape[0], call.v_GTE.shape[2]
    out_THE = call.q_HTD.new_empty(num_rows, heads, value_dim)
    keys, values = cache.pools(call.layer)
    attention = _Attention(
        ctypes.addressof(rows),
        _Heads.of(call.q_HTD),
        _Heads.of(call.k_GTD),
        _Heads.of(call.v_GTE),
        keys.data_ptr(),
        values.data_ptr(),
        out_THE.data_ptr(),
        kv_heads,
        heads // kv_heads,
        key_dim,
        value_dim,
        _NO_WINDOW if call.window is None else call.window,
        least_count(heads * (key_dim + value_dim)),
        call.scale,
    )
    return attention, out_THE


def _readable(call: AttentionCall) -> AttentionCall:
    """With the numbers of a head side by side."""
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (call.q_HTD, call.k_GTD, call.v_GTE))
    return replace(call, q_HTD=q, k_GTD=k, v_GTE=v)


def _is_known(call: AttentionCall, cache: KVCache) -> bool:
    """Whether the kernel computes this; all else is `PagedStep`'s to compute or to refuse."""
    if needs_exact(call) or call.k_GTD.shape[2] % _LANES or call.v_GTE.shape[2] % _LANES:
        return False
    return all(x.dtype == cache.dtype for x in (call.q_HTD, call.k_GTD, call.v_GTE))
