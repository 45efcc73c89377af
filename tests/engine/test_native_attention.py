"""Attention in C++ against PyTorch's, and against itself where a sequence is cut in other steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.native_attention import NativeStep
from timbre_server.engine.paged_attention import PagedStep, SequenceRows
from timbre_server.engine.step_kinds import agrees, step_for
from timbre_server.native import library as native

CPU = torch.device("cpu")
LENGTHS = (1, 7, 8, 9, 40, 77, 300)
CHUNKS = ((2, 2), (1, 40), (9, 77), (70, 200), (130, 130), (1, 7))
"""Rows and keys of sequences of one step."""


def filled_cache(
    shape: LayerShape, lengths: Sequence[int], block_size: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[KVCache, list[tuple[int, ...]]]:
    """A cache with the keys and values of all tokens before each sequence's last, and NaN everywhere else;
    and the sequences' blocks, in no order."""
    torch.manual_seed(5)
    counts = [-(-length // block_size) for length in lengths]
    cache = KVCache([shape], num_blocks=sum(counts) + 1, block_size=block_size, dtype=dtype, device=CPU)
    free = (torch.randperm(sum(counts)) + 1).tolist()
    tables = [tuple(free.pop() for _ in range(count)) for count in counts]
    for pool in cache.pools(shape.layer):
        pool.fill_(math.nan)
        for length, table in zip(lengths, tables, strict=True):
            for position in range(length - 1):
                slot = table[position // block_size] * block_size + position % block_size
                pool[slot] = torch.randn(pool.shape[1:]).to(dtype)
    return cache, tables


def decodes(lengths: Sequence[int], tables: Sequence[tuple[int, ...]]) -> list[SequenceRows]:
    return [
        SequenceRows(row, 1, length - 1, table)
        for row, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]


def chunked(lengths: Sequence[tuple[int, int]], tables: Sequence[tuple[int, ...]]) -> list[SequenceRows]:
    starts = accumulate((rows for rows, _ in lengths), initial=0)
    return [
        SequenceRows(first, rows, keys - rows, table)
        for first, (rows, keys), table in zip(starts, lengths, tables, strict=False)
    ]


def forget(cache: KVCache, layer: int, sequences: Sequence[SequenceRows], window: int) -> None:
    """NaN for what lies before the windows of all rows."""
    for sequence in sequences:
        for position in range(sequence.start - window + 1):
            block, place = divmod(position, cache.block_size)
            for pool in cache.pools(layer):
                pool[sequence.block_table[block] * cache.block_size + place] = math.nan


def random_call(
    shape: LayerShape, num_rows: int, group: int = 3, window: int | None = None, **more: float
) -> AttentionCall:
    """Heads as a model's projections lay them out: [T, H, D], seen as [H, T, D]."""

    def heads(count: int, dim: int) -> Tensor:
        return torch.randn(num_rows, count, dim).transpose(0, 1)

    count = shape.num_kv_heads
    q_HTD, k_GTD = heads(count * group, shape.key_dim), heads(count, shape.key_dim)
    v_GTE = heads(count, shape.value_dim)
    return AttentionCall(shape.layer, q_HTD, k_GTD, v_GTE, shape.key_dim**-0.5, window, **more)


def in_dtype(call: AttentionCall, dtype: torch.dtype) -> AttentionCall:
    q_HTD, k_GTD, v_GTE = (tensor.to(dtype) for tensor in (call.q_HTD, call.k_GTD, call.v_GTE))
    return AttentionCall(call.layer, q_HTD, k_GTD, v_GTE, call.scale, call.window)


@pytest.mark.cpp
@pytest.mark.parametrize("block_size", [1, 4, 16, 24])
@pytest.mark.parametrize("window", [None, 1, 13])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim"),
    [(3, 3, 64, 64), (1, 1, 32, 32), (2, 7, 8, 16), (2, 4, 128, 72), (1, 8, 256, 256)],
)
def test_single_rows_equal_padded_groups(
    kv_heads: int, group: int, key_dim: int, value_dim: int, window: int | None, block_size: int
) -> None:
    shape = LayerShape(2, kv_heads, key_dim, value_dim)
    cache, tables = filled_cache(shape, LENGTHS[:-1], block_size)
    rows, call = decodes(LENGTHS[:-1], tables), random_call(shape, len(LENGTHS) - 1, group, window)
    want_THE, got_THE = PagedStep(cache, rows).attend(call), NativeStep(cache, rows).attend(call)
    torch.testing.assert_close(got_THE, want_THE, rtol=1e-5, atol=1e-5)


@pytest.mark.cpp
@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("window", [None, 1, 13, 100])
@pytest.mark.parametrize(
    ("kv_heads", "group", "key_dim", "value_dim"),
    [(3, 3, 64, 64), (1, 1, 32, 32), (2, 7, 8, 16), (1, 30, 16, 24)],
)
def test_chunks_equal_pytorchs_and_their_keys_and_values_are_stored(
    kv_heads: int, group: int, key_dim: int, value_dim: int, window: int | None, block_size: int
) -> None:
    shape = LayerShape(2, kv_heads, key_dim, value_dim)
    (cache, tables), (other, _) = (filled_cache(shape, [n for _, n in CHUNKS], block_size) for _ in range(2))
    rows, call = chunked(CHUNKS, tables), random_call(shape, sum(n for n, _ in CHUNKS), group, window)
    if window is not None:
        forget(cache, 2, rows, window)
        forget(other, 2, rows, window)
    got_THE, want_THE = NativeStep(cache, rows).attend(call), PagedStep(other, rows).attend(call)
    torch.testing.assert_close(got_THE, want_THE, rtol=1e-5, atol=1e-5)
    for pool, wanted in zip(cache.pools(2), other.pools(2), strict=True):
        torch.testing.assert_close(pool, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_a_row_of_a_prompt_is_bit_for_bit_the_same_however_it_is_cut(
    dtype: torch.dtype, window: int | None
) -> None:
    shape, length = LayerShape(0, 3, 64, 64), 150
    cache, (table, _) = filled_cache(shape, (length, length), dtype=dtype)
    call = in_dtype(random_call(shape, length, window=window), dtype)
    whole_THE = NativeStep(cache, [SequenceRows(0, length, 0, table)]).attend(call)
    for cuts in ((0, 2, 66, 149, 150), (0, 97, 150)):
        for start, end in pairwise(cuts):
            tensors = (tensor[:, start:end] for tensor in (call.q_HTD, call.k_GTD, call.v_GTE))
            step = NativeStep(cache, [SequenceRows(0, end - start, start, table, in_chunk=True)])
            part_THE = step.attend(AttentionCall(0, *tensors, call.scale, window))
            assert torch.equal(part_THE, whole_THE[start:end])


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [4, 16, 256])
def test_chunks_and_single_rows_of_one_step_agree(dtype: torch.dtype, block_size: int) -> None:
    torch.manual_seed(0)
    shapes = (LayerShape(0, 2, 32, 32), LayerShape(1, 1, 64, 40), LayerShape(2, 2, 12, 12))
    cache = KVCache(shapes, num_blocks=1, block_size=block_size, dtype=dtype, device=CPU)
    assert agrees(NativeStep, cache, shapes)
    assert step_for(cache, shapes, native=True) is NativeStep
    assert step_for(cache, shapes) is PagedStep


@pytest.mark.cpp
@pytest.mark.parametrize("sizes", [(3, 64, 64), (2, 40, 72), (1, 8, 8), (2, 80, 24), (1, 96, 128)])
def test_a_bfloat16_cache_is_as_near_to_the_truth_as_padded_groups(sizes: tuple[int, int, int]) -> None:
    shape = LayerShape(0, *sizes)
    cache, tables = filled_cache(shape, LENGTHS, dtype=torch.bfloat16)
    rows, call = decodes(LENGTHS, tables), in_dtype(random_call(shape, len(LENGTHS)), torch.bfloat16)
    padded_THE, got_THE = PagedStep(cache, rows).attend(call), NativeStep(cache, rows).attend(call)
    exact, _ = filled_cache(shape, LENGTHS)
    for pool, narrow in zip(exact.pools(0), cache.pools(0), strict=True):
        pool.copy_(narrow)
    truth_THE = PagedStep(exact, rows).attend(in_dtype(call, torch.float32))
    # Sums in another order may round to the number beside.
    torch.testing.assert_close(got_THE, truth_THE.bfloat16(), rtol=2**-7, atol=1e-6)
    assert (got_THE - truth_THE).abs().mean() <= (padded_THE - truth_THE).abs().mean()


@pytest.mark.cpp
@pytest.mark.parametrize("window", [None, 1, 50, 150])
@pytest.mark.parametrize(
    "sizes", [(3, 64, 64), (2, 40, 72), (1, 8, 8), (2, 80, 24), (1, 96, 128), (1, 256, 256)]
)
def test_chunks_of_a_bfloat16_cache_are_near_to_the_truth(
    sizes: tuple[int, int, int], window: int | None
) -> None:
    shape, lengths = LayerShape(0, *sizes), (*CHUNKS, (200, 300), (3, 257))
    cache, tables = filled_cache(shape, [keys for _, keys in lengths], dtype=torch.bfloat16)
    rows = chunked(lengths, tables)
    call = in_dtype(random_call(shape, sum(n for n, _ in lengths), window=window), torch.bfloat16)
    if window is not None:
        forget(cache, 0, rows, window)
    got_THE = NativeStep(cache, rows).attend(call)
    exact, _ = filled_cache(shape, [keys for _, keys in lengths])
    for pool, narrow in zip(exact.pools(0), cache.pools(0), strict=True):
        pool.copy_(narrow)
    truth_THE = PagedStep(exact, rows).attend(in_dtype(call, torch.float32))
    # Results are rounded to 8 bits, and so are weights where the matrix unit takes them.
    torch.testing.assert_close(got_THE.float(), truth_THE, rtol=2**-7, atol=2**-8)
    assert (got_THE - truth_THE).abs().mean() <= 2 * (truth_THE.bfloat16() - truth_THE).abs().mean()


@pytest.mark.cpp
def test_scores_far_apart_and_scores_that_are_no_numbers_are_as_in_pytorch() -> None:
    shape, lengths = LayerShape(0, 1, 8, 8), (30, 30)
    cache, tables = filled_cache(shape, lengths)
    rows, call = decodes(lengths, tables), random_call(shape, 2, group=2)
    call.q_HTD[:, 0] *= 1000
    call.q_HTD[1, 1, 3] = math.nan
    want_THE, got_THE = PagedStep(cache, rows).attend(call), NativeStep(cache, rows).attend(call)
    assert torch.isnan(got_THE[1, 1]).all()
    torch.testing.assert_close(got_THE, want_THE, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("lengths", [[(1, n) for n in LENGTHS], CHUNKS, ((1, 300), (3, 80))])
def test_a_row_is_bit_for_bit_the_same_alone_in_a_crowd_and_on_any_threads(
    dtype: torch.dtype, window: int | None, lengths: Sequence[tuple[int, int]]
) -> None:
    shape = LayerShape(0, 3, 64, 64)
    cache, tables = filled_cache(shape, [keys for _, keys in lengths], dtype=dtype)
    rows = chunked(lengths, tables)
    call = in_dtype(random_call(shape, sum(n for n, _ in lengths), window=window), dtype)
    before = torch.get_num_threads()
    try:
        crowds = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            crowds.append(NativeStep(cache, rows).attend(call))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(crowds[0], crowds[1])
    assert torch.equal(crowds[0], crowds[2])
    for own in rows:
        last = own.first_row + own.num_rows
        tensors = (tensor[:, own.first_row : last] for tensor in (call.q_HTD, call.k_GTD, call.v_GTE))
        alone = NativeStep(cache, [SequenceRows(0, own.num_rows, own.start, own.block_table)])
        alone_THE = alone.attend(AttentionCall(0, *tensors, call.scale, window))
        assert torch.equal(alone_THE, crowds[0][own.first_row : last])


@pytest.mark.cpp
def test_soft_caps_are_left_to_pytorch() -> None:
    shape, lengths = LayerShape(0, 2, 16, 16), ((1, 9), (4, 20))
    cache, tables = filled_cache(shape, [keys for _, keys in lengths])
    rows, call = chunked(lengths, tables), random_call(shape, 5, softcap=0.5)
    assert torch.equal(NativeStep(cache, rows).attend(call), PagedStep(cache, rows).attend(call))


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    for cached in (native.library, native.kernel):
        cached.cache_clear()
    yield
    for cached in (native.library, native.kernel):
        cached.cache_clear()


@pytest.mark.usefixtures("without_compiler")
def test_without_a_compiler_the_groups_are_padded_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shape = LayerShape(0, 2, 16, 16)
    cache, _ = filled_cache(shape, (3,))
    assert step_for(cache, [shape], native=True) is PagedStep
    assert "no C++ compiler was found; install one of no-such-compiler" in caplog.text


@pytest.mark.cpp
def test_a_kernel_that_computes_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shape = LayerShape(0, 2, 16, 16)
    cache, _ = filled_cache(shape, (3,))
    attend = NativeStep.attend
    monkeypatch.setattr(NativeStep, "attend", lambda step, call: attend(step, call) * 1.001)
    assert step_for(cache, [shape], native=True) is PagedStep
    assert "something else than PyTorch" in caplog.text


@pytest.mark.cpp
@pytest.mark.parametrize("lengths", [((1, 7), (1, 40)), ((5, 9), (1, 40))])
def test_heads_whose_numbers_lie_apart(lengths: Sequence[tuple[int, int]]) -> None:
    shape = LayerShape(0, 2, 16, 24)
    cache, tables = filled_cache(shape, [keys for _, keys in lengths])
    sequences = chunked(lengths, tables)
    call = random_call(shape, sum(rows for rows, _ in lengths))
    apart = replace(
        call,
        **{name: getattr(call, name).mT.contiguous().mT for name in ("q_HTD", "k_GTD", "v_GTE")},
    )
    assert apart.q_HTD.stride(2) != 1
    want = NativeStep(cache, sequences).attend(call)
    assert torch.equal(NativeStep(cache, sequences).attend(apart), want)
