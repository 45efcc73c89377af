"""Attention's kernel for recorded steps against the plain one, under the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.decode_graphs import DecodeTables
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import PagedStep, SequenceRows
from timbre_server.engine.paged_decode import DecodeStep, can_attend, store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache_of(
    shape: LayerShape, block_size: int, num_blocks: int, dtype: torch.dtype = torch.float32
) -> KVCache:
    torch.manual_seed(0)
    cache = KVCache([shape], num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=DEVICE)
    for pool in cache.pools(0):
        pool.normal_()
    return cache


def call_of(shape: LayerShape, heads: int, rows: int, window: int | None = None) -> AttentionCall:
    def random(count: int, dim: int) -> torch.Tensor:
        return torch.randn(rows, count, dim, device=DEVICE).transpose(0, 1)

    kv_heads, dim = shape.num_kv_heads, shape.key_dim
    return AttentionCall(
        0, random(heads, dim), random(kv_heads, dim), random(kv_heads, dim), scale=dim**-0.5, window=window
    )


def rows_of(lengths: list[int], block_size: int) -> list[SequenceRows]:
    """Each sequence's blocks lie in falling order."""
    found, last = [], sum(-(-length // block_size) for length in lengths)
    for row, length in enumerate(lengths):
        count = -(-length // block_size)
        found.append(SequenceRows(row, 1, length - 1, tuple(range(last, last - count, -1))))
        last -= count
    return found


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_size", "window", "lengths"),
    [
        (4, 4, 64, 16, None, [1, 16, 17, 150]),
        (9, 3, 64, 16, None, [70, 3]),
        (8, 2, 80, 1, None, [5, 1, 66]),
        (16, 1, 16, 256, None, [300, 64, 65]),
        (8, 1, 128, 4, 7, [1, 6, 7, 8, 90]),
        (2, 1, 24, 16, 70, [69, 70, 71, 200]),
    ],
)
def test_the_kernel_gives_what_padded_groups_give(
    heads: int, kv_heads: int, dim: int, block_size: int, window: int | None, lengths: list[int]
) -> None:
    shape = LayerShape(0, kv_heads, dim, dim)
    assert can_attend(shape)
    sequences = rows_of(lengths, block_size)
    num_blocks = 1 + sum(len(s.block_table) for s in sequences)
    caches = [cache_of(shape, block_size, num_blocks) for _ in range(2)]
    call = call_of(shape, heads, len(lengths), window)
    want = PagedStep(caches[0], sequences).attend(call)
    got = DecodeStep.of(caches[1], sequences).attend(call)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for expected, written in zip(caches[0].pools(0), caches[1].pools(0), strict=True):
        assert torch.equal(written, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str
)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize(
    ("softcap", "sinks"), [(1.0, False), (50.0, False), (None, True), (2.0, True)], ids=str
)
def test_scores_are_capped_before_the_mask_and_sinks_only_take_their_share(
    softcap: float | None, sinks: bool, window: int | None, dtype: torch.dtype
) -> None:
    """In 16 bits, too, against float32; the interpreter knows no products of bfloat16."""
    shape, heads, lengths = LayerShape(0, 2, 32, 32), 6, [1, 16, 90]
    sequences = rows_of(lengths, 16)
    num_blocks = 1 + sum(len(s.block_table) for s in sequences)
    cache = cache_of(shape, 16, num_blocks, dtype)
    exact = cache_of(shape, 16, num_blocks)
    for pool, rounded in zip(exact.pools(0), cache.pools(0), strict=True):
        pool.copy_(rounded)
    drawn = call_of(shape, heads, len(lengths), window)
    sinks_H = torch.linspace(-2, 4, heads, device=DEVICE) if sinks else None
    q, k, v = (5 * drawn.q_HTD).to(dtype), drawn.k_GTD.to(dtype), drawn.v_GTE.to(dtype)
    call = AttentionCall(
        0, q, k, v, drawn.scale, window, softcap, None if sinks_H is None else sinks_H.to(dtype)
    )
    want = PagedStep(exact, sequences).attend(
        AttentionCall(0, q.float(), k.float(), v.float(), drawn.scale, window, softcap, sinks_H)
    )
    got = DecodeStep.of(cache, sequences).attend(call)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=tolerance)


def test_rows_of_padding_give_zeros_and_change_no_other_row() -> None:
    shape = LayerShape(0, 2, 32, 32)
    sequences = rows_of([40, 9], 16)
    cache, call = cache_of(shape, 16, 6), call_of(shape, 4, 4)
    slots_T, blocks_TB, num_keys_T = DecodeStep.of(cache, sequences).tables
    zeros = torch.zeros(2, blocks_TB.shape[1], dtype=torch.int32, device=DEVICE)
    tables = DecodeTables(
        torch.cat([slots_T, torch.tensor([0, 1], device=DEVICE)]),
        torch.cat([blocks_TB, zeros]),
        torch.cat([num_keys_T, zeros[:, 0]]),
    )
    out = DecodeStep(cache, tables).attend(call)
    assert not out[2:].any()
    own = AttentionCall(0, call.q_HTD[:, :2], call.k_GTD[:, :2], call.v_GTE[:, :2], scale=call.scale)
    torch.testing.assert_close(out[:2], PagedStep(cache, sequences).attend(own), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "kv_heads", "dim"), [(1, 3, 64), (3, 1, 48), (65, 9, 128)])
def test_keys_and_values_go_to_their_slots_and_nowhere_else(
    dtype: torch.dtype, rows: int, kv_heads: int, dim: int
) -> None:
    torch.manual_seed(0)
    k_GTD, v_GTD = torch.randn(2, kv_heads, rows, dim, device=DEVICE).to(dtype)
    slots_T = torch.randperm(2 * rows + 1, device=DEVICE)[:rows]
    pools = torch.full((2, 2 * rows + 1, kv_heads, dim), torch.nan, dtype=dtype, device=DEVICE)
    want = pools.clone()
    want[0, slots_T], want[1, slots_T] = k_GTD.transpose(0, 1), v_GTD.transpose(0, 1)
    by_rows = k_GTD.transpose(0, 1).contiguous().transpose(0, 1)
    by_columns = v_GTD.transpose(1, 2).contiguous().transpose(1, 2)
    for k, v in ((k_GTD, v_GTD), (by_rows, by_columns)):
        got = pools.clone()
        store(k, v, slots_T, *got)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_served() -> None:
    assert not can_attend(LayerShape(0, 2, 64, 32))
    assert not can_attend(LayerShape(0, 2, 512, 512))
