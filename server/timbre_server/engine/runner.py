"""Executes step plans: rows in, tokens out. It decides nothing.

A plan says how many tokens of each sequence run. The runner flattens them to one batch, tells the adapters
which rows are whose, runs the model once over the paged cache, and draws. Rows of adapters that scout run
through the base alone before. Every failure leaves no step
state behind: the attention context and the row tables are taken away however the step ends.

Legend: N kept rows, V vocabulary, S rows that scout, D hidden features.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from timbre_server.engine.batch import forward, hidden_states
from timbre_server.engine.decode_graphs import DecodeGraphs, RecordableAdapters, graphs_for, kept_bytes
from timbre_server.engine.kv_cache import KVCache, bytes_per_block
from timbre_server.engine.kv_sizing import (
    KVRequest,
    KVSize,
    available_memory_bytes,
    default_kv_bytes,
    size_kv_cache,
)
from timbre_server.engine.messages import Ready, Routing
from timbre_server.engine.model_loader import PreparedModel, end_token_ids, longest_sequence
from timbre_server.engine.native_attention import NativeStep
from timbre_server.engine.plan_rows import Kept, batch_of, kept_of, scouting_batch, scouting_rows, spans_of
from timbre_server.engine.prompted_attention import AttentionPrompts
from timbre_server.engine.sampler import SamplingRow, prompt_logprobs, sample
from timbre_server.engine.sequence import ChunkResult, ScheduledChunk, StepPlan, StepResult
from timbre_server.engine.step_kinds import step_for
from timbre_server.engine.step_tapes import StepTapes
from timbre_server.operators.row_table import RowTable

_UNKNOWN_MEMORY_BYTES = 5 << 30


class RowAdapters(RecordableAdapters, Protocol):
    """What the runner needs of the adapted model."""

    @property
    def attention_prompts(self) -> AttentionPrompts | None:
        """Of the rows that are set; None where adapters leave attention alone."""
        ...

    def set_rows(self, table: RowTable, head_table: RowTable) -> None: ...

    def scout(self, rows_S: Tensor, hidden_SD: Tensor, kept_rows_N: Tensor) -> None:
        """Of the rows that are set, what the base alone made of those that scout."""
        ...

    def clear_rows(self) -> None: ...

    def expert_tokens(self) -> Mapping[int, Sequence[int]]:
        """By slot: how often each expert acted in the forward that has just run."""
        ...

    def choices_of(self, rows: Sequence[int]) -> Mapping[int, Sequence[ExpertChoice]]:
        """Which experts acted on these rows of it."""
        ...


class ExpertChoice(Protocol):
    """The experts of one adapter that acted on one row at one place, with their gates."""

    @property
    def slot(self) -> int: ...
    @property
    def place(self) -> str: ...
    @property
    def experts(self) -> tuple[int, ...]: ...
    @property
    def gates(self) -> tuple[float, ...]: ...


@dataclass(frozen=True, slots=True)
class RunnerOptions:
    block_size: int = 16
    kv_cache_bytes: int | None = None
    """None: a share of free memory (`kv_sizing.default_kv_bytes`)."""
    max_model_len: int | None = None
    """None: as long as the model and the cache allow."""
    max_num_seqs: int = 256
    adapter_memory_bytes: int = 0
    """Left free for adapters when the cache is sized on a GPU."""
    native_attention: bool = False
    """On a CPU, attend in C++ where that gives what PyTorch gives."""
    max_num_batched_tokens: int = 512
    """Of a step."""
    record_steps: bool = True
    """Record steps and replay them: on a GPU with Triton those that decode, as CUDA graphs; on a CPU with
    attention in C++ all, as tapes."""


class Runner:
    """One model with its KV cache. Not for several threads."""

    def __init__(self, prepared: PreparedModel, adapters: RowAdapters, options: RunnerOptions) -> None:
        """Sizes and reserves the KV cache.

        Raises:
            UnsupportedModel: the cache cannot hold one sequence of the length asked for.
        """
        self._loaded = prepared.loaded
        self._model = prepared.loaded.model
        self._adapters = adapters
        self._options = options
        self._sites = prepared.probed.sites
        self._hidden_size = prepared.probed.hidden_size
        self._attention = tuple(layer.attention for layer in prepared.probed.layers)
        size = _kv_size(prepared, options)
        self.max_model_len = size.max_model_len
        self.cache = KVCache(
            prepared.probed.kv_shapes,
            num_blocks=size.num_blocks,
            block_size=options.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        self._step = step_for(self.cache, prepared.probed.kv_shapes, native=options.native_attention)
        limits = options.max_num_seqs, size.max_model_len
        self._recordings: DecodeGraphs | StepTapes | None = None
        if options.record_steps and self._step is NativeStep:
            self._recordings = StepTapes(self._model, self.cache, adapters, options.max_num_batched_tokens)
        elif options.record_steps:
            self._recordings = graphs_for(prepared, self.cache, adapters, limits)

    @property
    def num_blocks(self) -> int:
        """Block 0, which no sequence may get, included."""
        return self.cache.num_blocks

    def info(self) -> Ready:
        """What the model is and what it was given, for the other process."""
        text = self._model.config.get_text_config()
        return Ready(
            model_name=self._loaded.name,
            model_digest=self._loaded.digest,
            model_type=self._model.config.model_type,
            dtype=str(self._model.dtype).removeprefix("torch."),
            device=str(self._model.device),
            vocab_size=int(text.vocab_size),
            max_model_len=self.max_model_len,
            eos_token_ids=end_token_ids(self._model),
            sites=self._sites,
            block_size=self._options.block_size,
            num_kv_blocks=self.num_blocks,
            kv_cache_bytes=self.cache.num_bytes,
            model_bytes=self._loaded.num_bytes,
            adapter_budget_bytes=self._options.adapter_memory_bytes,
            hidden_size=self._hidden_size,
            attention=self._attention,
            stack=self._loaded.stack,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a plan of at least one chunk; results are in its order.

        A chunk whose logits are not finite gets an ``error_message``; the others are not touched by it.

        Raises:
            RuntimeError: the device failed; nothing of the step counts, and no step state is left.
        """
        kept = [kept_of(chunk) for chunk in plan.chunks]
        batch = batch_of(plan, kept)
        table = self._table((chunk, chunk.num_tokens) for chunk in plan.chunks)
        head_table = self._table((c, keep.num_rows) for c, keep in zip(plan.chunks, kept, strict=True))
        with torch.inference_mode():
            try:
                scouted = self._scout(plan)
                self._adapters.set_rows(table, head_table)
                if scouted is not None:
                    self._adapters.scout(*scouted, self._rows(batch.kept_rows))
                prompts = self._adapters.attention_prompts
                logits_NV = self._recordings.logits(batch) if self._recordings and scouted is None else None
                if logits_NV is None:
                    logits_NV = forward(self._model, self.cache, batch, prompts, self._step)
                expert_tokens, routing = self._routing(plan)
            finally:
                self._adapters.clear_rows()
            results = _results(plan, kept, logits_NV)
        for index, told in routing.items():
            results[index].routing = told
        return StepResult(results, expert_tokens)

    def _scout(self, plan: StepPlan) -> tuple[Tensor, Tensor] | None:
        """The rows that scout and what the base alone makes of them, its entries in the cache afterwards."""
        rows = scouting_rows(plan)
        if not rows:
            return None
        return self._rows(rows), hidden_states(self._model, self.cache, scouting_batch(plan))

    def _rows(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self.cache.device)

    def _routing(self, plan: StepPlan) -> tuple[dict[str, tuple[int, ...]], dict[int, tuple[Routing, ...]]]:
        """Of the forward that has just run: counts by digest, and the choices of chunks that ask, by place in
        the plan."""
        digests = {
            slot: digest
            for chunk in plan.chunks
            for (slot, _), (digest, _) in zip(chunk.sequence.adapter_slots, chunk.sequence.mix, strict=True)
        }
        counts = {digests[slot]: tuple(found) for slot, found in self._adapters.expert_tokens().items()}
        ends = accumulate(chunk.num_tokens for chunk in plan.chunks)
        rows = {
            end - 1: index
            for index, (chunk, end) in enumerate(zip(plan.chunks, ends, strict=True))
            if chunk.tells_routing
        }
        choices = self._adapters.choices_of(list(rows)) if rows else {}
        return counts, {
            index: tuple(Routing(digests[c.slot], c.place, c.experts, c.gates) for c in choices[row])
            for row, index in rows.items()
        }

    def _table(self, last_rows: Iterable[tuple[ScheduledChunk, int]]) -> RowTable:
        """Of each chunk, its last so many rows."""
        spans = [span for chunk, count in last_rows for span in spans_of(chunk, chunk.end - count)]
        return RowTable(spans, self.cache.device)


def _results(plan: StepPlan, kept: Sequence[Kept], logits_NV: Tensor) -> tuple[ChunkResult, ...]:
    first_rows = [0, *accumulate(keep.num_rows for keep in kept)]
    drawing = [index for index, keep in enumerate(kept) if keep.draws_token]
    results = [ChunkResult() for _ in plan.chunks]
    if drawing:
        rows = [first_rows[index] + kept[index].num_prompt_rows for index in drawing]
        rows_B = torch.tensor(rows, device=logits_NV.device)
        sampling_rows = [_sampling_row(plan.chunks[index]) for index in drawing]
        drawn = sample(logits_NV.index_select(0, rows_B), sampling_rows)
        for index, result in zip(drawing, drawn, strict=True):
            results[index] = result
    for chunk, keep, first, result in zip(plan.chunks, kept, first_rows, results, strict=False):
        if keep.num_prompt_rows and result.error_message is None:
            _score_prompt(chunk, logits_NV[first : first + keep.num_prompt_rows], result)
    return tuple(results)


def _sampling_row(chunk: ScheduledChunk) -> SamplingRow:
    sequence, params = chunk.sequence, chunk.sequence.request.sampling
    seen = sequence.seen_ids() if params.repetition_penalty != 1.0 else array("q")
    return SamplingRow(params, seen, sequence.token_ids[sequence.num_prompt_tokens :])


def _score_prompt(chunk: ScheduledChunk, logits_NV: Tensor, result: ChunkResult) -> None:
    num_top = chunk.sequence.request.sampling.prompt_logprobs
    assert num_top is not None, "only chunks of requests that ask have prompt rows"
    if not bool(torch.isfinite(logits_NV.amax(dim=1)).all()):
        result.error_message = "The model gave logits that are not finite numbers for a prompt token."
        return
    first = chunk.start + chunk.num_virtual + 1
    following = chunk.sequence.token_ids[first : first + logits_NV.shape[0]]
    result.prompt_logprobs = tuple(prompt_logprobs(logits_NV, following, num_top))


def _kv_size(prepared: PreparedModel, options: RunnerOptions) -> KVSize:
    model = prepared.loaded.model
    request = KVRequest(
        bytes_per_block=bytes_per_block(prepared.probed.kv_shapes, options.block_size, model.dtype),
        block_size=options.block_size,
        model_len=longest_sequence(model.config, options.max_model_len),
        asked_bytes=options.kv_cache_bytes,
        asked_len=options.max_model_len,
    )
    on_gpu = model.device.type == "cuda"
    free_bytes = torch.cuda.mem_get_info(model.device)[0] if on_gpu else _available_cpu_bytes()
    reserved_bytes = options.adapter_memory_bytes + prepared.probed.changed_bytes
    if on_gpu and options.record_steps:
        # Recordings come after the cache, and their memory is theirs for good.
        vocab_size = int(model.config.get_text_config().vocab_size)
        reserved_bytes += kept_bytes(options.max_num_seqs, vocab_size)
    default = default_kv_bytes(free_bytes, reserved_bytes=reserved_bytes, on_gpu=on_gpu)
    return size_kv_cache(request, default)


def _available_cpu_bytes() -> int:
    """What Linux says is available; elsewhere the cache gets its full share."""
    meminfo = Path("/proc/meminfo")
    return available_memory_bytes(meminfo.read_text()) if meminfo.exists() else _UNKNOWN_MEMORY_BYTES
