"""Greedy tokens equal transformers' own generate, for every family, whatever happens to a batch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.engine.attention import install_attention
from timbre_server.engine.fused_layers import fuse_layers
from timbre_server.engine.fused_norm import norm_of
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.kv_cache import bytes_per_block
from timbre_server.engine.messages import SamplingParams, Submit
from timbre_server.engine.model_loader import LoadedModel, PreparedModel
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.engine.probe import probe
from timbre_server.engine.runner import Runner, RunnerOptions
from timbre_server.engine.scheduler import Scheduler, SchedulerLimits

FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"),
    *("qwen3_moe", "mixtral", "gpt_oss"),
)
BLOCK_SIZE = 4
MAX_TOKENS = 13
VOCAB_SIZE = 131


class NoAdapters:
    def try_acquire(self, digest: str) -> int | None:
        return None

    def release(self, digest: str) -> None:
        raise AssertionError("nothing was acquired")

    def failure(self, digest: str) -> tuple[str, str] | None:
        return "adapter_load_failed", "there are no adapters here"

    def no_requests(self, digest: str) -> None:
        raise AssertionError("nothing was asked for")

    def favour(self, digests: Iterable[str]) -> None:
        raise AssertionError("nothing was asked for")

    def misfit(self, digests: Iterable[str]) -> str | None:
        return None


@dataclass
class Outcome:
    outputs: dict[str, list[int]]
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    unfinished_chunks: int = 0
    mixed_steps: int = 0


def prompts() -> list[list[int]]:
    """36 of lengths 1 to 45; every third begins like another one, over several blocks."""
    rng = random.Random(7)
    stem = [rng.randrange(1, VOCAB_SIZE) for _ in range(22)]
    made = []
    for index in range(36):
        own = [rng.randrange(1, VOCAB_SIZE) for _ in range(1 + (index * 7) % 23)]
        made.append(stem[: 9 + index % 14] + own if index % 3 == 0 else own)
    return made


def generated(model: PreTrainedModel, token_ids: Sequence[int]) -> list[int]:
    ids_1T = torch.tensor([token_ids])
    out = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=MAX_TOKENS, do_sample=False
    )
    return out[0, len(token_ids) :].tolist()


def served(
    model: PreTrainedModel, num_blocks: int, limits: SchedulerLimits, *, native: bool = False
) -> Outcome:
    install_attention(model)
    probed = probe(model)
    product_of = LinearPacker(model.dtype, model.device).product_of
    arithmetic = Arithmetic(product_of, norm_of=partial(norm_of, native=native))
    fuse_layers(model, probed.layers, "native" if native else "torch")
    adapted = AdaptedModel(model, probed.groups, arithmetic, probed.lone, parameters=probed.parameters)
    options = RunnerOptions(
        block_size=BLOCK_SIZE,
        kv_cache_bytes=num_blocks * bytes_per_block(probed.kv_shapes, BLOCK_SIZE, model.dtype),
        native_attention=native,
    )
    runner = Runner(PreparedModel(LoadedModel(model, "tiny", "sha256:0"), probed), adapted, options)
    for layer in range(len(probed.layers)):
        for pool in runner.cache.pools(layer):
            pool.fill_(float("nan"))
    blocks = BlockPool(runner.num_blocks, BLOCK_SIZE)
    scheduler = Scheduler(limits, blocks, NoAdapters())
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    for index, token_ids in enumerate(prompts()):
        scheduler.add(Submit(str(index), token_ids, sampling))
    return run(scheduler, runner)


def run(scheduler: Scheduler, runner: Runner) -> Outcome:
    outcome = Outcome({})
    while scheduler.has_work:
        plan = scheduler.schedule()
        assert plan.chunks
        drawn = [chunk.draws_token for chunk in plan.chunks]
        outcome.unfinished_chunks += drawn.count(False)
        outcome.mixed_steps += {chunk.num_tokens > 1 for chunk in plan.chunks} == {True, False}
        outcome.prefix_hit_tokens += scheduler.counts.prefix_hit_tokens
        outcome.preemptions += scheduler.counts.preemptions
        for event in scheduler.update(plan, runner.execute(plan)):
            assert event.error_message is None
            outcome.outputs.setdefault(event.request_id, []).extend(event.token_ids)
        scheduler.blocks.check_integrity()
    return outcome


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_generate_under_chunks_prefix_hits_and_preemption(
    family: str, tiny_model: Callable[[str], PreTrainedModel]
) -> None:
    reference = tiny_model(family)
    expected = {str(index): generated(reference, token_ids) for index, token_ids in enumerate(prompts())}
    assert len({tuple(tokens) for tokens in expected.values()}) > len(expected) // 2
    tight = SchedulerLimits(max_num_seqs=16, max_num_batched_tokens=23, max_model_len=64)
    outcome = served(tiny_model(family), 24, tight)
    assert outcome.outputs == expected
    assert outcome.prefix_hit_tokens > 0
    assert outcome.preemptions > 0
    assert outcome.unfinished_chunks > 0
    assert outcome.mixed_steps > 0
    assert served(tiny_model(family), 24, tight, native=True).outputs == expected
    wide = SchedulerLimits(
        max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=64, enable_prefix_caching=False
    )
    outcome = served(tiny_model(family), 700, wide)
    assert outcome.outputs == expected
    assert (outcome.prefix_hit_tokens, outcome.preemptions, outcome.unfinished_chunks) == (0, 0, 0)
