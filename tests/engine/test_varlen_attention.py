"""The one product of all sequences, with a twin of PyTorch's kernel, which has no CPU form, as documented."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import PagedStep, SequenceRows
from timbre_server.engine.step_kinds import Scores, agrees, step_for
from timbre_server.engine.varlen_attention import PAGE_SIZE, VarlenStep

CPU = torch.device("cpu")
SHAPES = (LayerShape(0, 2, 8, 8), LayerShape(1, 1, 16, 16))


def twin(
    q_TRD: Tensor,
    key: Tensor,
    value: Tensor,
    ends_of_rows: Tensor,
    ends_of_keys: Tensor,
    *most: int,
    **options: Any,
) -> Tensor:
    """Sequence by sequence; the last row is at the last key."""
    most_rows, most_keys = most
    block_table, (left, right) = options["block_table"], options["window_size"]
    assert ends_of_rows.dtype == ends_of_keys.dtype == torch.int32
    out = torch.empty_like(q_TRD)
    bounds = zip(ends_of_rows.tolist(), ends_of_keys.tolist(), strict=True)
    (first_row, first_key), *rest = bounds
    for index, (row, end) in enumerate(rest):
        q = q_TRD[first_row:row].transpose(0, 1)
        if block_table is None:
            k, v = key[first_key:end], value[first_key:end]
        else:
            blocks, used = block_table[index].long(), int(options["seqused_k"][index])
            k, v = key[blocks].flatten(0, 1)[:used], value[blocks].flatten(0, 1)[:used]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        assert q.shape[1] <= most_rows
        assert k.shape[1] <= most_keys
        assert options["enable_gqa"] == (q.shape[0] != k.shape[0])
        at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        keys = torch.arange(k.shape[1])
        seen = keys <= at + right
        if left >= 0:
            seen &= keys >= at - left
        group = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * options["scale"]
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[first_row:row] = (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)
        first_row, first_key = row, end
    return out


class TwinStep(VarlenStep):
    kernel = staticmethod(twin)


class OffByOne(VarlenStep):
    """A kernel that lines rows up with the first keys."""

    @staticmethod
    def kernel(*args: Any, window_size: tuple[int, int], **options: Any) -> Tensor:
        return twin(*args, window_size=(window_size[0], window_size[1] + 1), **options)


def cache(block_size: int = 4) -> KVCache:
    return KVCache(SHAPES, num_blocks=9, block_size=block_size, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("block_size", [4, 16, PAGE_SIZE])
def test_chunks_and_single_rows_are_as_in_padded_groups(block_size: int) -> None:
    torch.manual_seed(0)
    assert agrees(TwinStep, cache(block_size), SHAPES)


def test_a_kernel_of_another_meaning_is_found_out() -> None:
    torch.manual_seed(0)
    assert not agrees(OffByOne, cache(), SHAPES)


class Uncapped(PagedStep):
    def attend(self, call: AttentionCall) -> Tensor:
        return super().attend(replace(call, softcap=None))


class Sinkless(PagedStep):
    def attend(self, call: AttentionCall) -> Tensor:
        return super().attend(replace(call, sinks_H=None))


@pytest.mark.parametrize(
    ("kind", "scores"), [(Uncapped, Scores(are_capped=True)), (Sinkless, Scores(have_sinks=True))]
)
def test_a_kernel_is_tried_with_the_scores_that_layers_have(kind: type[PagedStep], scores: Scores) -> None:
    torch.manual_seed(0)
    assert agrees(kind, cache(), SHAPES)
    assert agrees(PagedStep, cache(), SHAPES, scores=(scores,))
    assert not agrees(kind, cache(), SHAPES, scores=(Scores(), scores))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_what_the_kernel_does_not_know_is_left_to_padded_groups(softcap: float | None) -> None:
    uneven = [LayerShape(0, 2, 8, 8 if softcap else 4)]
    own = KVCache(uneven, num_blocks=3, block_size=4, dtype=torch.float32, device=CPU)
    rows = [SequenceRows(0, 3, 0, (2,))]
    call = AttentionCall(
        0,
        torch.randn(2, 3, 8),
        torch.randn(2, 3, 8),
        torch.randn(2, 3, uneven[0].value_dim),
        0.5,
        None,
        softcap,
    )

    class NoKernel(VarlenStep):
        @staticmethod
        def kernel(*args: object, **options: object) -> Tensor:
            raise AssertionError("the kernel was called")

    torch.testing.assert_close(NoKernel(own, rows).attend(call), PagedStep(own, rows).attend(call))


def test_a_processor_takes_padded_groups() -> None:
    assert step_for(cache(), SHAPES) is PagedStep


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [16, PAGE_SIZE])
def test_the_kernel_itself_agrees_on_a_gpu(block_size: int) -> None:
    shapes: Sequence[LayerShape] = (LayerShape(0, 2, 64, 64), LayerShape(1, 8, 128, 128))
    own = KVCache(
        shapes, num_blocks=2, block_size=block_size, dtype=torch.bfloat16, device=torch.device("cuda")
    )
    assert step_for(own, shapes) is VarlenStep
