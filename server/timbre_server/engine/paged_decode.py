"""Attention of decode steps over the paged cache in Triton: no launch depends on the step's numbers.

Slots, lengths and block tables are read on the device, so a launch may be recorded in a CUDA graph and
replayed for the next step. One launch stores the rows' own keys and values. In the next a program has one
row's query heads of one KV head and a share of the row's keys, read where they are; a third joins the shares
(FlashDecoding: Dao et al., 2023). With scores s = scale q·k, or cap tanh(scale q·k / cap), m the largest of a
share, l = Σ exp(s - m), a = Σ exp(s - m) v, and c the head's sink, if it has one::

    out = Σ_shares exp(m - m*) a / (Σ_shares exp(m - m*) l + exp(c - m*)),    m* = max(m, c)

Products take the cache's dtype and sum in float32. Checked under Triton's interpreter and on an H200; soft
caps, sinks and the launch that stores not on a GPU yet.

Legend: T rows, B blocks of a row, H query heads, G KV heads, M query heads of one KV head, D dim, L keys of
a tile, S shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.decode_graphs import DecodeTables
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import SequenceRows

MAX_DIM = 256
PROGRAMS = 512
"""About as many at least: a GPU has some 130 processors, and each takes a few."""
MAX_SHARES = 16
TILE = 64


@triton.jit
def _store_heads(x, x_head, x_row, pool, slots, G: tl.constexpr, D: tl.constexpr):
    PG: tl.constexpr = triton.next_power_of_2(G)
    PD: tl.constexpr = triton.next_power_of_2(D)
    t, g, d = tl.program_id(0).to(tl.int64), tl.arange(0, PG)[:, None], tl.arange(0, PD)[None, :]
    is_gd = (g < G) & (d < D)
    x_GD = tl.load(x + g * x_head + t * x_row + d, mask=is_gd, other=0.0)
    tl.store(pool + (tl.load(slots + t) * G + g) * D + d, x_GD, mask=is_gd)


@triton.jit
def _store(k, k_head, k_row, v, v_head, v_row, keys, values, slots, G: tl.constexpr, D: tl.constexpr):
    if tl.program_id(1) == 0:
        _store_heads(k, k_head, k_row, keys, slots, G, D)
    else:
        _store_heads(v, v_head, v_row, values, slots, G, D)


@triton.jit
def _shares(
    q, q_head, q_row, k, v, blocks, num_blocks, num_keys, scale, softcap, window, sums, maxima,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = H // G
    PM: tl.constexpr = triton.next_power_of_2(max(M, 16))
    PD: tl.constexpr = triton.next_power_of_2(max(D, 16))
    t, g, share = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    shares = tl.num_programs(2)
    m, d = tl.arange(0, PM), tl.arange(0, PD)
    is_md = (m < M)[:, None] & (d < D)[None, :]
    h = g * M + m
    q_MD = tl.load(q + h[:, None] * q_head + t * q_row + d[None, :], mask=is_md, other=0.0)

    last = tl.load(num_keys + t)
    first = tl.maximum(last - window, 0)
    length = tl.cdiv(tl.cdiv(last - first, shares), TILE) * TILE
    start = first + share * length
    end = tl.minimum(start + length, last)
    max_M = tl.full((PM,), -3.0e38, tl.float32)
    sum_M = tl.zeros((PM,), tl.float32)
    sum_MD = tl.zeros((PM, PD), tl.float32)
    for tile in range(start, end, TILE):
        key = tile + tl.arange(0, TILE)
        is_key = key < end
        block = tl.load(blocks + t * num_blocks + key // BLOCK, mask=is_key, other=0)
        slot = block.to(tl.int64) * BLOCK + key % BLOCK
        at = (slot[:, None] * G + g) * D + d[None, :]
        is_ld = is_key[:, None] & (d < D)[None, :]
        k_LD = tl.load(k + at, mask=is_ld, other=0.0)
        s_ML = tl.dot(q_MD, tl.trans(k_LD), input_precision=PRECISION) * scale
        if softcap is not None:
            s_ML = softcap * (2 * tl.sigmoid(2 * s_ML / softcap) - 1)  # tanh
        s_ML = tl.where(is_key[None, :], s_ML, float("-inf"))
        higher_M = tl.maximum(max_M, tl.max(s_ML, axis=1))
        p_ML = tl.exp(s_ML - higher_M[:, None])
        less_M = tl.exp(max_M - higher_M)
        v_LD = tl.load(v + at, mask=is_ld, other=0.0)
        sum_MD = tl.dot(p_ML.to(v_LD.dtype), v_LD, sum_MD * less_M[:, None], input_precision=PRECISION)
        sum_M = sum_M * less_M + tl.sum(p_ML, axis=1)
        max_M = higher_M
    of_share = (t * H + h) * shares + share
    tl.store(sums + of_share[:, None] * D + d[None, :], sum_MD, mask=is_md)
    tl.store(maxima + of_share * 2, max_M, mask=m < M)
    tl.store(maxima + of_share * 2 + 1, sum_M, mask=m < M)


@triton.jit
def _join(sums, maxima, sinks, out, H: tl.constexpr, D: tl.constexpr, SHARES: tl.constexpr):
    PD: tl.constexpr = triton.next_power_of_2(D)
    row, s, d = tl.program_id(0).to(tl.int64), tl.arange(0, SHARES), tl.arange(0, PD)
    of_share = row * SHARES + s
    max_S, sum_S = tl.load(maxima + of_share * 2), tl.load(maxima + of_share * 2 + 1)
    highest = tl.max(max_S, axis=0)
    if sinks is not None:
        sink = tl.load(sinks + row % H).to(tl.float32)
        highest = tl.maximum(highest, sink)
    weight_S = tl.where(sum_S > 0, tl.exp(max_S - highest), 0.0)
    a_SD = tl.load(sums + of_share[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    total = tl.sum(weight_S * sum_S, axis=0)
    if sinks is not None:
        total += tl.exp(sink - highest)
    out_D = tl.sum(weight_S[:, None] * a_SD, axis=0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * D + d, out_D.to(out.dtype.element_ty), mask=d < D)


@dataclass(frozen=True, slots=True, eq=False)
class DecodeStep:
    """The context of a forward pass of decode rows."""

    cache: KVCache
    tables: DecodeTables

    @classmethod
    def of(cls, cache: KVCache, sequences: Sequence[SequenceRows]) -> DecodeStep:
        """Of sequences of one row each, in the order of the batch."""
        size, width = cache.block_size, max(len(s.block_table) for s in sequences)
        slots = [s.block_table[s.start // size] * size + s.start % size for s in sequences]
        blocks = [(*s.block_table, *(0,) * (width - len(s.block_table))) for s in sequences]
        return cls(
            cache,
            DecodeTables(
                torch.tensor(slots, device=cache.device),
                torch.tensor(blocks, dtype=torch.int32, device=cache.device),
                torch.tensor([s.end for s in sequences], dtype=torch.int32, device=cache.device),
            ),
        )

    def attend(self, call: AttentionCall) -> Tensor:
        cache, (slots_T, blocks_TB, num_keys_T) = self.cache, self.tables
        k, v = cache.pools(call.layer)
        store(call.k_GTD, call.v_GTE, slots_T, k, v)
        q_HTD = call.q_HTD if call.q_HTD.stride(2) == 1 else call.q_HTD.contiguous()
        (heads, rows, dim), kv_heads = q_HTD.shape, k.shape[1]
        most_keys = blocks_TB.shape[1] * cache.block_size
        wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, rows * kv_heads))
        shares = max(1, min(wanted, MAX_SHARES, triton.next_power_of_2(triton.cdiv(most_keys, TILE))))
        sums = torch.empty(rows, heads, shares, dim, dtype=torch.float32, device=q_HTD.device)
        maxima = torch.empty(rows, heads, shares, 2, dtype=torch.float32, device=q_HTD.device)
        out_THD = torch.empty(rows, heads, dim, dtype=q_HTD.dtype, device=q_HTD.device)
        _shares[rows, kv_heads, shares](
            q_HTD, q_HTD.stride(0), q_HTD.stride(1), k, v, blocks_TB, blocks_TB.stride(0), num_keys_T,
            call.scale, call.softcap, most_keys if call.window is None else call.window, sums, maxima,
            H=heads, G=kv_heads, D=dim, BLOCK=cache.block_size, TILE=TILE,
            PRECISION="ieee" if q_HTD.dtype == torch.float32 else "tf32",
        )  # fmt: skip
        _join[(rows * heads,)](sums, maxima, call.sinks_H, out_THD, H=heads, D=dim, SHARES=shares)
        return out_THD


def store(k_GTD: Tensor, v_GTD: Tensor, slots_T: Tensor, keys_SGD: Tensor, values_SGD: Tensor) -> None:
    """As `KVCache.write`."""
    k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k_GTD, v_GTD))
    kv_heads, rows, dim = k.shape
    _store[rows, 2](
        k, k.stride(0), k.stride(1), v, v.stride(0), v.stride(1), keys_SGD, values_SGD, slots_T, G=kv_heads,
        D=dim,
    )  # fmt: skip


def can_attend(shape: LayerShape) -> bool:
    """Whether a layer's sizes are served."""
    return shape.key_dim == shape.value_dim <= MAX_DIM
