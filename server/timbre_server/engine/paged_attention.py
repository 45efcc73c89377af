"""Attention of one step over the paged cache, in plain PyTorch, on any device.

Rows of one sequence are consecutive. A sequence with one row (a decode, or a chunk of one token) joins a
*length group*: its keys and values are gathered, padded to the group's longest, and the group is one
batched product. Query rows are packed as [R, G, group, D], so that KV heads are never repeated. A
sequence with more rows is one product of its own: causal when all its keys are in the step itself,
with an explicit mask when some are cached or out of the window. Padding repeats the sequence's own last
slot under a mask: nothing but written slots of the sequence is ever read.

Soft caps and sinks, which the fused product does not know, take the exact fallback: scores, cap, mask,
softmax in float32, product.

Legend: T rows, R rows of a group, L keys, N rows of one sequence, H query heads, G KV heads, M query heads
of one KV head, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache

_GROUP_SLACK = 32
"""Keys that a row may be padded by before it starts a new length group, beside a quarter of its length."""


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """``num_rows`` rows of one sequence, at positions ``start ..``; ``block_table`` covers them all."""

    first_row: int
    num_rows: int
    start: int
    block_table: tuple[int, ...]
    in_chunk: bool = False
    """As `ScheduledChunk.decodes` says; of several rows they are in any case."""

    @property
    def end(self) -> int:
        return self.start + self.num_rows


@dataclass(frozen=True, slots=True)
class _Group:
    rows_R: Tensor
    slots_N: Tensor
    """R x L slots, flat."""
    mask_R11L: Tensor | None


@dataclass(frozen=True, slots=True)
class _Chunk:
    rows: SequenceRows
    slots_L: Tensor | None
    """None: all keys are rows of this step."""
    mask_NL: Tensor | None
    """None: plainly causal."""


class PagedStep:
    """The context of one forward pass: where its rows go in the cache and what each may see."""

    def __init__(self, cache: KVCache, sequences: Sequence[SequenceRows]) -> None:
        self._cache = cache
        self._singles = sorted((s for s in sequences if s.num_rows == 1), key=lambda s: s.end)
        self._chunks = [s for s in sequences if s.num_rows > 1]
        self._slots = self._slots_of(sequences)
        ordered = sorted(sequences, key=lambda s: s.first_row)
        self._slots_T = torch.cat([self._slots[s.first_row][s.start :] for s in ordered]).to(cache.device)
        self._groups_by_window: dict[int | None, list[_Group]] = {}
        self._chunks_by_mask: dict[tuple[int | None, bool], list[_Chunk]] = {}

    def _slots_of(self, sequences: Sequence[SequenceRows]) -> dict[int, Tensor]:
        """By first row: the slot of every position up to the last row's (on the CPU)."""
        size = self._cache.block_size
        tables = [s.block_table[: -(-s.end // size)] for s in sequences]
        blocks_B = torch.tensor([block for table in tables for block in table], dtype=torch.int64)
        slots = (blocks_B[:, None] * size + torch.arange(size)).flatten()
        firsts = accumulate((len(table) * size for table in tables[:-1]), initial=0)
        return {s.first_row: slots[first : first + s.end] for s, first in zip(sequences, firsts, strict=True)}

    def attend(self, call: AttentionCall) -> Tensor:
        """Store the step's keys and values, then attend: [T, H, E]."""
        self.write(call)
        q_THD = call.q_HTD.transpose(0, 1)
        out_THE = q_THD.new_empty(*q_THD.shape[:2], call.v_GTE.shape[2])
        self._attend_singles(call, q_THD, out_THE)
        for chunk in self._masked_chunks(call.window, explicit=needs_exact(call)):
            first, last = chunk.rows.first_row, chunk.rows.first_row + chunk.rows.num_rows
            out_THE[first:last] = self._attend_chunk(call, chunk)
        return out_THE

    def write(self, call: AttentionCall) -> None:
        """Store the step's keys and values."""
        self._cache.write(call.layer, self._slots_T, call.k_GTD.transpose(0, 1), call.v_GTE.transpose(0, 1))

    def _attend_singles(self, call: AttentionCall, q_THD: Tensor, out_THE: Tensor) -> None:
        """Of the sequences with one row, into their rows of ``out``; their keys and values are stored."""
        for group in self._groups(call.window):
            out_THE.index_copy_(0, group.rows_R, self._attend_group(call, group, q_THD))

    def _attend_group(self, call: AttentionCall, group: _Group, q_THD: Tensor) -> Tensor:
        k_NGD, v_NGE = self._cache.read(call.layer, group.slots_N)
        num_rows, num_kv_heads = group.rows_R.shape[0], k_NGD.shape[1]
        q_RHD = q_THD.index_select(0, group.rows_R)
        q_RGMD = q_RHD.view(num_rows, num_kv_heads, -1, q_RHD.shape[2])
        k_RGLD = k_NGD.view(num_rows, -1, *k_NGD.shape[1:]).transpose(1, 2)
        v_RGLE = v_NGE.view(num_rows, -1, *v_NGE.shape[1:]).transpose(1, 2)
        sinks_1GM1 = None if call.sinks_H is None else call.sinks_H.view(1, num_kv_heads, -1, 1)
        if not needs_exact(call):
            out_RGME = scaled_dot_product_attention(
                q_RGMD, k_RGLD, v_RGLE, attn_mask=group.mask_R11L, scale=call.scale
            )
        else:
            out_RGME = exact_attention(q_RGMD, k_RGLD, v_RGLE, group.mask_R11L, call, sinks_1GM1)
        return out_RGME.reshape(num_rows, q_RHD.shape[1], -1)

    def _attend_chunk(self, call: AttentionCall, chunk: _Chunk) -> Tensor:
        first, last = chunk.rows.first_row, chunk.rows.first_row + chunk.rows.num_rows
        if chunk.slots_L is None:
            k_GLD, v_GLE = call.k_GTD[:, first:last], call.v_GTE[:, first:last]
        else:
            k_LGD, v_LGE = self._cache.read(call.layer, chunk.slots_L)
            k_GLD, v_GLE = k_LGD.transpose(0, 1), v_LGE.transpose(0, 1)
        num_kv_heads = k_GLD.shape[0]
        q_HND = call.q_HTD[:, first:last]
        q_GMND = q_HND.reshape(num_kv_heads, -1, *q_HND.shape[1:])
        group = q_GMND.shape[1]
        k_GMLD = k_GLD[:, None].expand(-1, group, -1, -1)
        v_GMLE = v_GLE[:, None].expand(-1, group, -1, -1)
        sinks_GM11 = None if call.sinks_H is None else call.sinks_H.view(num_kv_heads, group, 1, 1)
        if not needs_exact(call):
            out_GMNE = scaled_dot_product_attention(
                q_GMND,
                k_GMLD,
                v_GMLE,
                attn_mask=chunk.mask_NL,
                is_causal=chunk.mask_NL is None,
                scale=call.scale,
            )
        else:
            out_GMNE = exact_attention(q_GMND, k_GMLD, v_GMLE, chunk.mask_NL, call, sinks_GM11)
        return out_GMNE.flatten(0, 1).transpose(0, 1)

    def _groups(self, window: int | None) -> list[_Group]:
        groups = self._groups_by_window.get(window)
        if groups is None:
            groups = [self._group(members, window) for members in length_groups(self._singles, window)]
            self._groups_by_window[window] = groups
        return groups

    def _group(self, members: Sequence[SequenceRows], window: int | None) -> _Group:
        lengths = [visible_keys(s, window) for s in members]
        longest = max(lengths)
        rows = [s.first_row for s in members]
        slots_RL = torch.empty(len(members), longest, dtype=torch.int64)
        for i, (rows_i, length) in enumerate(zip(members, lengths, strict=True)):
            seen = self._slots[rows_i.first_row][-length:]
            slots_RL[i, :length] = seen
            slots_RL[i, length:] = seen[-1]
        mask_R11L = None
        if min(lengths) < longest:
            hidden_RL = torch.arange(longest) >= torch.tensor(lengths)[:, None]
            mask_R11L = self._additive(hidden_RL)[:, None, None, :]
        device = self._cache.device
        return _Group(torch.tensor(rows, device=device), slots_RL.flatten().to(device), mask_R11L)

    def _masked_chunks(self, window: int | None, *, explicit: bool) -> list[_Chunk]:
        chunks = self._chunks_by_mask.get((window, explicit))
        if chunks is None:
            chunks = [self._chunk(rows, window, explicit) for rows in self._chunks]
            self._chunks_by_mask[window, explicit] = chunks
        return chunks

    def _chunk(self, rows: SequenceRows, window: int | None, explicit: bool) -> _Chunk:
        if rows.start == 0:
            plain = not explicit and (window is None or window >= rows.num_rows)
            return _Chunk(rows, None, None if plain else self._mask(rows, 0, window))
        lowest = 0 if window is None else max(0, rows.start - window + 1)
        slots_L = self._slots[rows.first_row][lowest:].to(self._cache.device)
        return _Chunk(rows, slots_L, self._mask(rows, lowest, window))

    def _mask(self, rows: SequenceRows, lowest: int, window: int | None) -> Tensor:
        keys_L = torch.arange(lowest, rows.end)
        queries_N1 = torch.arange(rows.start, rows.end)[:, None]
        hidden_NL = keys_L > queries_N1
        if window is not None:
            hidden_NL |= keys_L <= queries_N1 - window
        return self._additive(hidden_NL)

    def _additive(self, hidden: Tensor) -> Tensor:
        mask = torch.zeros(hidden.shape, dtype=self._cache.dtype).masked_fill_(hidden, float("-inf"))
        return mask.to(self._cache.device)


def needs_exact(call: AttentionCall) -> bool:
    """Whether the fused product would not do."""
    return call.softcap is not None or call.sinks_H is not None


def visible_keys(rows: SequenceRows, window: int | None) -> int:
    """How many keys the last row sees."""
    return rows.end if window is None else min(rows.end, window)


def length_groups(by_length: Sequence[SequenceRows], window: int | None) -> list[list[SequenceRows]]:
    """Cut rows, sorted by length, into groups in which none is padded by much."""
    groups: list[list[SequenceRows]] = []
    limit = -1
    for rows in by_length:
        length = visible_keys(rows, window)
        if length > limit:
            groups.append([])
            limit = length + length // 4 + _GROUP_SLACK
        groups[-1].append(rows)
    return groups


def exact_attention(
    q_ABXD: Tensor,
    k_ABLD: Tensor,
    v_ABLE: Tensor,
    mask: Tensor | None,
    call: AttentionCall,
    sinks: Tensor | None,
) -> Tensor:
    """``softmax(cap(scale q k) + mask, with sinks) v`` with the softmax in float32.

    ``mask`` and ``sinks`` broadcast to the scores [A, B, X, L]; a sink's probability is dropped.
    """
    scores_ABXL = torch.matmul(q_ABXD, k_ABLD.transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        scores_ABXL = torch.tanh(scores_ABXL / call.softcap) * call.softcap
    if mask is not None:
        scores_ABXL = scores_ABXL + mask
    if sinks is not None:
        column_ABX1 = sinks.to(scores_ABXL.dtype).expand(*scores_ABXL.shape[:-1], 1)
        scores_ABXL = torch.cat([scores_ABXL, column_ABX1], dim=-1)
    probabilities_ABXL = torch.softmax(scores_ABXL, dim=-1, dtype=torch.float32).to(q_ABXD.dtype)
    if sinks is not None:
        probabilities_ABXL = probabilities_ABXL[..., :-1]
    return torch.matmul(probabilities_ABXL, v_ABLE)
