"""One plan in, one result out: drawn tokens, scored prompts, rows told to the adapters, and failures."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from timbre_server.engine.attention import install_attention
from timbre_server.engine.context import current
from timbre_server.engine.kv_cache import bytes_per_block
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.model_loader import LoadedModel, PreparedModel
from timbre_server.engine.probe import probe
from timbre_server.engine.runner import Runner, RunnerOptions
from timbre_server.engine.sequence import ScheduledChunk, Sequence, StepPlan
from timbre_server.errors import UnsupportedModel
from timbre_server.operators.row_table import RowTable, Span

TinyModel = Callable[[str], PreTrainedModel]
BLOCK_SIZE = 4
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class RecordedRows:
    """Notes what the runner says of rows; applies nothing."""

    attention_prompts: None = None
    told: list[tuple[RowTable, RowTable]] = field(default_factory=list)
    is_set: bool = False

    def set_rows(self, table: RowTable, head_table: RowTable) -> None:
        self.told.append((table, head_table))
        self.is_set = True

    def clear_rows(self) -> None:
        self.is_set = False

    def expert_tokens(self) -> dict[int, list[int]]:
        assert self.is_set
        return {}

    def choices_of(self, rows: Sequences[int]) -> dict[int, list[Any]]:
        assert self.is_set
        return {row: [] for row in rows}


def runner_of(model: PreTrainedModel, rows: RecordedRows | None = None, **options: int) -> Runner:
    install_attention(model)
    probed = probe(model)
    options = {"kv_cache_bytes": 32 * bytes_per_block(probed.kv_shapes, BLOCK_SIZE, model.dtype)} | options
    runner = Runner(
        PreparedModel(LoadedModel(model, "tiny", "sha256:0"), probed),
        rows or RecordedRows(),
        RunnerOptions(block_size=BLOCK_SIZE, **options),
    )
    for layer in range(len(probed.layers)):
        for pool in runner.cache.pools(layer):
            pool.fill_(float("nan"))
    return runner


def sequence_of(
    token_ids: list[int],
    blocks: list[int],
    sampling: SamplingParams = GREEDY,
    slots: tuple[tuple[int, float], ...] = (),
) -> Sequence:
    uses = tuple(AdapterUse(f"adapter {slot}", weight) for slot, weight in slots)
    made = Sequence(Submit("r", token_ids, sampling, uses), list(token_ids), 1)
    made.block_table = blocks
    made.mix = tuple((use.digest, use.weight) for use in uses)
    made.adapter_slots = slots
    return made


def plain_logits(model: PreTrainedModel, token_ids: Sequences[int]) -> Tensor:
    ids_1T = torch.tensor([token_ids])
    with torch.inference_mode():
        return model(ids_1T, attention_mask=torch.ones_like(ids_1T)).logits[0]


def test_a_token_is_drawn_only_where_the_chunk_reaches_the_end(tiny_model: TinyModel) -> None:
    expected_TV = plain_logits(tiny_model("llama"), [5, 6, 7, 8, 9])
    runner = runner_of(tiny_model("llama"))
    sequence = sequence_of([5, 6, 7, 8, 9], [9, 3])
    (first,) = runner.execute(StepPlan((ScheduledChunk(sequence, 3),))).results
    assert (first.token_id, first.logprobs, first.prompt_logprobs) == (None, None, ())
    sequence.num_computed_tokens = 3
    (second,) = runner.execute(StepPlan((ScheduledChunk(sequence, 2),))).results
    assert second.token_id == int(expected_TV[-1].argmax())


def test_prompt_tokens_are_scored_across_chunks_and_not_again_once_there_is_output(
    tiny_model: TinyModel,
) -> None:
    token_ids = [5, 6, 7, 8, 9, 10]
    logprobs_TV = plain_logits(tiny_model("gpt2"), token_ids).log_softmax(dim=1)
    runner = runner_of(tiny_model("gpt2"))
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=2)
    sequence, other = sequence_of(token_ids, [9, 3, 4], sampling), sequence_of([1, 2], [7])
    scored = []
    for count in (4, 2):
        plan = StepPlan((ScheduledChunk(other, 2), ScheduledChunk(sequence, count)))
        scored.append(runner.execute(plan).results[1].prompt_logprobs)
        sequence.num_computed_tokens += count
    assert [len(part) for part in scored] == [4, 1]
    together = [*scored[0], *scored[1]]
    assert [each.token_id for each in together] == token_ids[1:]
    want = [float(logprobs_TV[at, token]) for at, token in enumerate(token_ids[1:])]
    assert [each.logprob for each in together] == pytest.approx(want, abs=1e-4)
    assert [len(each.top) for each in together] == [2] * 5
    sequence.num_computed_tokens = 0
    sequence.token_ids.append(11)
    (again,) = runner.execute(StepPlan((ScheduledChunk(sequence, 7),))).results
    assert again.prompt_logprobs == ()
    assert again.token_id is not None


def test_adapters_are_told_every_row_and_the_head_s_rows_apart(tiny_model: TinyModel) -> None:
    rows = RecordedRows()
    runner = runner_of(tiny_model("llama"), rows)
    scored = sequence_of(
        [1, 2, 3], [1], SamplingParams(temperature=0.0, prompt_logprobs=0), ((4, 0.5), (2, 1.0))
    )
    unfinished = sequence_of([1, 2, 3, 4], [2], slots=((7, 1.0),))
    base = sequence_of([1, 2], [3])
    runner.execute(
        StepPlan((ScheduledChunk(base, 2), ScheduledChunk(unfinished, 3), ScheduledChunk(scored, 3)))
    )
    ((table, head_table),) = rows.told
    mix = ((4, 0.5), (2, 1.0))
    assert table.spans == tuple(Span(*own, in_chunk=True) for own in ((2,), (3, ((7, 1.0),)), (3, mix)))
    assert head_table.spans == tuple(Span(*own, in_chunk=True) for own in ((1,), (3, mix)))
    assert not rows.is_set


def test_a_prompt_s_row_is_one_of_a_chunk_even_alone(tiny_model: TinyModel) -> None:
    rows = RecordedRows()
    runner = runner_of(tiny_model("llama"), rows)
    sequence = sequence_of([1, 2, 3], [1], slots=((7, 1.0),))
    for num_tokens in (2, 1, 1):
        chunk = ScheduledChunk(sequence, num_tokens)
        (outcome,) = runner.execute(StepPlan((chunk,))).results
        sequence.num_computed_tokens = chunk.end
        if outcome.token_id is not None:
            sequence.token_ids.append(outcome.token_id)
    assert [table.spans[0].in_chunk for table, _ in rows.told] == [True, True, False]


def test_a_step_that_keeps_no_logits_at_all_still_fills_the_cache(tiny_model: TinyModel) -> None:
    runner = runner_of(tiny_model("gemma3"))
    sequence = sequence_of([5, 6, 7, 8, 9], [9, 3])
    runner.execute(StepPlan((ScheduledChunk(sequence, 4),)))
    keys_SGD, _ = runner.cache.pools(2)
    assert torch.isfinite(keys_SGD[9 * BLOCK_SIZE : 10 * BLOCK_SIZE]).all()
    assert torch.isnan(keys_SGD[: 9 * BLOCK_SIZE]).all()


def test_a_row_whose_logits_are_no_numbers_fails_alone(tiny_model: TinyModel) -> None:
    model = tiny_model("mistral")
    expected_TV = plain_logits(tiny_model("mistral"), [5, 6])
    model.get_input_embeddings().weight[77] = float("nan")
    runner = runner_of(model)
    sick, well = sequence_of([77, 3], [1]), sequence_of([5, 6], [2])
    scored = sequence_of([77, 3, 4], [3], SamplingParams(temperature=0.0, prompt_logprobs=1))
    plan = StepPlan((ScheduledChunk(sick, 2), ScheduledChunk(well, 2), ScheduledChunk(scored, 2)))
    results = runner.execute(plan).results
    assert results[0].error_message is not None
    assert (results[1].error_message, results[1].token_id) == (None, int(expected_TV[-1].argmax()))
    assert "prompt token" in str(results[2].error_message)


def test_a_failing_step_leaves_neither_rows_nor_context_behind(tiny_model: TinyModel) -> None:
    rows = RecordedRows()
    runner = runner_of(tiny_model("llama"), rows)
    with pytest.raises(IndexError):
        runner.execute(StepPlan((ScheduledChunk(sequence_of([10_000_000], [1]), 1),)))
    assert len(rows.told) == 1
    assert not rows.is_set
    with pytest.raises(RuntimeError, match="outside a step"):
        current()


def test_info_says_what_was_loaded_and_reserved(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = 9
    info = runner_of(model, adapter_memory_bytes=5).info()
    assert (info.model_name, info.model_digest, info.model_type) == ("tiny", "sha256:0", "llama")
    assert (info.dtype, info.device, info.vocab_size, info.eos_token_ids) == ("float32", "cpu", 131, (9,))
    assert (info.num_kv_blocks, info.block_size, info.max_model_len) == (32, 4, 124)
    assert info.kv_cache_bytes == 32 * 4 * 3 * 2 * (8 + 8) * 4
    assert (len(info.sites), info.adapter_budget_bytes) == (33, 5)


def test_a_cache_too_small_for_the_asked_length_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModel, match="max_model_len = 200"):
        runner_of(tiny_model("llama"), max_model_len=200)


def test_an_unasked_cache_is_bounded_and_takes_the_model_s_whole_length(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    install_attention(model)
    probed = probe(model)
    prepared = PreparedModel(LoadedModel(model, "tiny", "sha256:0"), probed)
    runner = Runner(prepared, RecordedRows(), RunnerOptions())
    assert runner.max_model_len == 256
    assert runner.cache.num_bytes <= 1 << 30
