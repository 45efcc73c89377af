"""The paged attention of a step against dense attention over each sequence, in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from timbre_server.engine.attention import attend
from timbre_server.engine.context import AttentionCall, active, current
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import PagedStep, SequenceRows, length_groups
from timbre_server.errors import UnsupportedModel

LAYER = 5
HEADS, KV_HEADS, KEY_DIM, VALUE_DIM = 6, 2, 8, 4
BLOCK_SIZE = 4
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    window: int | None = None
    softcap: float | None = None
    sinks_H: Tensor | None = None


VARIANTS = {
    "plain": Variant(),
    "window": Variant(window=5),
    "window of one": Variant(window=1),
    "soft cap": Variant(softcap=2.0),
    "soft cap and window": Variant(window=6, softcap=2.0),
    "sinks": Variant(sinks_H=torch.linspace(-2, 2, HEADS)),
    "sinks and window": Variant(window=3, sinks_H=torch.linspace(-2, 2, HEADS)),
}


def new_cache(num_blocks: int = 64) -> KVCache:
    """Full of NaN: whatever is read without having been written shows."""
    shape = LayerShape(LAYER, KV_HEADS, KEY_DIM, VALUE_DIM)
    cache = KVCache([shape], num_blocks=num_blocks, block_size=BLOCK_SIZE, dtype=torch.float32, device=CPU)
    for pool in cache.pools(LAYER):
        pool.fill_(math.nan)
    return cache


def dense(q_HTD: Tensor, k_GTD: Tensor, v_GTE: Tensor, variant: Variant) -> Tensor:
    """One whole sequence, written as the papers have it, in float64: [T, H, E]."""
    group = HEADS // KV_HEADS
    k_HTD = k_GTD.double().repeat_interleave(group, dim=0)
    v_HTE = v_GTE.double().repeat_interleave(group, dim=0)
    scores_HTT = q_HTD.double() @ k_HTD.transpose(1, 2) * 0.3
    if variant.softcap is not None:
        scores_HTT = variant.softcap * torch.tanh(scores_HTT / variant.softcap)
    at = torch.arange(q_HTD.shape[1])
    seen_TT = at[None, :] <= at[:, None]
    if variant.window is not None:
        seen_TT &= at[:, None] - at[None, :] < variant.window
    weights_HTT = torch.where(seen_TT, scores_HTT, -math.inf).exp()
    total_HT1 = weights_HTT.sum(dim=2, keepdim=True)
    if variant.sinks_H is not None:
        total_HT1 = total_HT1 + variant.sinks_H.double().exp()[:, None, None]
    return ((weights_HTT / total_HT1) @ v_HTE).transpose(0, 1).float()


@dataclass(frozen=True)
class Tokens:
    """One sequence's queries, keys and values, and the blocks that it lives in."""

    q_HTD: Tensor
    k_GTD: Tensor
    v_GTE: Tensor
    block_table: tuple[int, ...]


def random_tokens(lengths: Sequence[int]) -> list[Tokens]:
    torch.manual_seed(3)
    free = (torch.randperm(63) + 1).tolist()
    made = []
    for length in lengths:
        blocks = tuple(free.pop() for _ in range(-(-length // BLOCK_SIZE)))
        q_HTD = torch.randn(HEADS, length, KEY_DIM)
        k_GTD, v_GTE = torch.randn(KV_HEADS, length, KEY_DIM), torch.randn(KV_HEADS, length, VALUE_DIM)
        made.append(Tokens(q_HTD, k_GTD, v_GTE, blocks))
    return made


def run_step(cache: KVCache, step: Sequence[tuple[Tokens, int, int]], variant: Variant) -> list[Tensor]:
    """Attend rows start..end of each sequence, flattened together; one [n, H, E] for each."""
    rows, first = [], 0
    for tokens, start, end in step:
        rows.append(SequenceRows(first, end - start, start, tokens.block_table))
        first += end - start
    q_HTD = torch.cat([tokens.q_HTD[:, start:end] for tokens, start, end in step], dim=1)
    k_GTD = torch.cat([tokens.k_GTD[:, start:end] for tokens, start, end in step], dim=1)
    v_GTE = torch.cat([tokens.v_GTE[:, start:end] for tokens, start, end in step], dim=1)
    call = AttentionCall(LAYER, q_HTD, k_GTD, v_GTE, 0.3, variant.window, variant.softcap, variant.sinks_H)
    out_THE = PagedStep(cache, rows).attend(call)
    return list(out_THE.split([end - start for _, start, end in step]))


@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_and_single_rows_together_equal_dense_attention(name: str) -> None:
    variant, cache = VARIANTS[name], new_cache()
    tokens = random_tokens([23, 9, 14, 1, 40])
    cuts = ((0, 7, 8, 20, 23), (0, 1, 2, 3, 9), (0, 13, 13, 13, 14), (0, 0, 1, 1, 1), (0, 38, 39, 40, 40))
    pieces: list[list[Tensor]] = [[] for _ in tokens]
    for turn in range(4):
        running = [i for i, cut in enumerate(cuts) if cut[turn + 1] > cut[turn]]
        step = [(tokens[i], cuts[i][turn], cuts[i][turn + 1]) for i in running]
        for i, out in zip(running, run_step(cache, step, variant), strict=True):
            pieces[i].append(out)
    for each, piece in zip(tokens, pieces, strict=True):
        want_THE = dense(each.q_HTD, each.k_GTD, each.v_GTE, variant)
        torch.testing.assert_close(torch.cat(piece), want_THE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_decode_rows_of_very_different_lengths_equal_dense_attention(name: str) -> None:
    variant, cache = VARIANTS[name], new_cache()
    lengths = [2, 61, 5, 33, 4, 60, 17]
    tokens = random_tokens(lengths)
    for each, length in zip(tokens, lengths, strict=True):
        run_step(cache, [(each, 0, length - 1)], variant)
    step = [(each, length - 1, length) for each, length in zip(tokens, lengths, strict=True)]
    for each, out in zip(tokens, run_step(cache, step, variant), strict=True):
        want_THE = dense(each.q_HTD, each.k_GTD, each.v_GTE, variant)
        torch.testing.assert_close(out, want_THE[-1:], rtol=1e-5, atol=1e-5)


def test_rows_of_like_length_share_a_group_and_others_do_not() -> None:
    rows = [SequenceRows(i, 1, end - 1, ()) for i, end in enumerate((3, 30, 200, 210, 1000))]
    assert [[r.end for r in group] for group in length_groups(rows, None)] == [[3, 30], [200, 210], [1000]]
    assert [[r.end for r in group] for group in length_groups(rows, 16)] == [[3, 30, 200, 210, 1000]]


class Layer(nn.Module):
    layer_idx = LAYER
    is_causal = True


def call_through_transformers_shape(**options: object) -> Tensor:
    cache = new_cache()
    tokens = random_tokens([3])[0]
    with active(PagedStep(cache, [SequenceRows(0, 3, 0, tokens.block_table)])):
        out, weights = attend(
            Layer(), tokens.q_HTD[None], tokens.k_GTD[None], tokens.v_GTE[None], None, **options
        )
    assert weights is None
    return out


def test_the_registered_function_answers_in_transformers_shape_and_default_scale() -> None:
    tokens = random_tokens([3])[0]
    want_THE = dense(tokens.q_HTD * (KEY_DIM**-0.5 / 0.3), tokens.k_GTD, tokens.v_GTE, Variant())
    got_1THE = call_through_transformers_shape(dropout=0.0, position_ids=torch.arange(3))
    torch.testing.assert_close(got_1THE, want_THE[None], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_not_understood_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match=r"Layer passed the tensors alibi, position_bias"):
        call_through_transformers_shape(position_bias=torch.zeros(1), alibi=torch.zeros(1), fine=3)


def test_attention_in_both_directions_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="both directions"):
        call_through_transformers_shape(is_causal=False)


def test_the_context_is_gone_after_an_error_and_the_outer_one_is_back() -> None:
    outer = PagedStep(new_cache(), [SequenceRows(0, 1, 0, (1,))])
    with active(outer):
        with pytest.raises(ZeroDivisionError), active(PagedStep(new_cache(), [SequenceRows(0, 1, 0, (1,))])):
            raise ZeroDivisionError
        assert current() is outer
    with pytest.raises(RuntimeError, match="outside a step"):
        current()
