"""Decode steps as CUDA graphs: what one step launches is recorded and replayed for those like it.

A decode step of a large model is a thousand small launches, which take Python several times as long as the
GPU. Steps of one row for each sequence that differ in nothing but numbers are recorded at the third in a row
and then replayed: tokens, positions, slots, lengths and block tables lie in tensors that stay where they are,
and attention reads them there (`paged_decode`). Base rows are padded to a few counts, so a handful of graphs
serves them all. Where adapters are in use, a graph is of one row table: it serves until a sequence comes or
ends, or one of its adapters leaves, and then steps run as usual until they repeat; there is one such graph at
a time. What cannot be recorded (a model or an operator that asks the device in between) runs as ever, with a
line in the log. In 16 bits attention's two kernels round differently.

Legend: T rows, R rows at most, B blocks of the longest sequence, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from timbre_server.engine.batch import Batch, run_rows
from timbre_server.engine.context import AttentionContext
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.model_loader import PreparedModel
from timbre_server.engine.step_kinds import Scores, agrees

RECORD_AT = 3
"""At so many like steps in a row; before, a recording may be for nothing."""
_CHECKED = ((1, 18), (1, 1), (1, 200), (1, 16))
"""Rows and keys of the sequences that attention's kernel is tried on."""
PADDED_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192)
"""And the multiples of `MANY_ROWS`."""
MANY_ROWS = 256

_log = logging.getLogger(__name__)

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Records what a function launches; gives what launches it again, and returns the very same tensor."""


class DecodeTables(NamedTuple):
    """Of each row: the slot of its own key and value (int64), its block table, padded with 0, and how many
    keys it sees, its own included (int32). A row of no keys is padding: it gives zeros, and its slot is in
    block 0, which is no sequence's."""

    slots_T: Tensor
    blocks_TB: Tensor
    num_keys_T: Tensor


class RecordableAdapters(Protocol):
    """What recordings need of the adapted model."""

    def launches(self) -> tuple[Hashable, frozenset[int]] | None:
        """Of the rows that are set: a key that is equal for steps that launch the same on the same tensors,
        and the slots of the adapters that act; without any, there may as well be more rows. None where it
        cannot be told beforehand what they launch."""
        ...

    @property
    def act_beside_layers(self) -> bool:
        """Whether they change more than what layers and blocks give."""
        ...

    def when_dropped(self, listener: Callable[[int | None], None]) -> None:
        """To be told each slot that is dropped, and None when weights change."""
        ...

    def recorded(self) -> Callable[[], None]:
        """Of the forward that has just run. Calling it makes as if it had just run again; keeping it keeps
        all that its launches read."""
        ...

    def forget_forward(self) -> None:
        """What the last forward left does not count."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    replay: Callable[[], Tensor]
    slots: frozenset[int]
    tell: Callable[[], None]
    """What the adapters of the recorded forward leave; it keeps what the graph's launches read."""


MakeStep = Callable[[KVCache, DecodeTables], AttentionContext]


class DecodeGraphs:
    """The recordings of one model, and the tensors that they read their step from."""

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        adapters: RecordableAdapters,
        make_step: MakeStep,
        record: Record,
        limits: tuple[int, int],
    ) -> None:
        """``limits``: rows of a step, and tokens of a sequence."""
        max_rows, max_model_len = limits
        self._model, self._cache, self._adapters = model, cache, adapters
        self._make_step, self._record = make_step, record
        self._max_rows = _padded(max_rows)
        num_blocks = -(-max_model_len // cache.block_size)
        device = cache.device
        self._numbers_4R = torch.zeros(4, self._max_rows, dtype=torch.int64, device=device)
        """Tokens, positions, slots, and keys that each row sees."""
        self._blocks_RB = torch.zeros(self._max_rows, num_blocks, dtype=torch.int32, device=device)
        self._tables: list[tuple[int, ...]] = [()] * self._max_rows
        """What `_blocks_RB` holds of each row."""
        self._graphs: dict[Hashable, _Graph] = {}
        """One for each padded number of base rows, and one with adapters."""
        self._last: tuple[Hashable, int] = (None, 0)
        """The key of the last decode step, and how often in a row it was that."""
        adapters.when_dropped(self._forget)

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [T, V] of a decode step, float32, valid until the next; None: run it as usual.

        The adapters' rows are set. Call it under ``torch.inference_mode()``.
        """
        num_rows = len(batch.token_ids)
        if num_rows > self._max_rows or not batch.is_decode:
            return None
        own = self._adapters.launches()
        if own is None:
            return None
        of_adapters, slots = own
        width = num_rows if slots else _padded(num_rows)
        key = (width, of_adapters)
        graph = self._graphs.get(key)
        if graph is None:
            last, count = self._last
            self._last = (key, count + 1 if last == key else 1)
            if self._last[1] != RECORD_AT:
                return None
        self._fill(batch, width)
        if graph is None:
            return self._recorded(key, slots, width)[:num_rows]
        logits_TV = graph.replay()
        graph.tell()
        return logits_TV[:num_rows]

    def _forget(self, slot: int | None) -> None:
        """Drop what was recorded with an adapter that leaves, and what that kept of it; None: everything."""
        for key, graph in tuple(self._graphs.items()):
            if slot is None or slot in graph.slots:
                del self._graphs[key]
        self._last = (None, 0)

    def _recorded(self, key: Hashable, slots: frozenset[int], width: int) -> Tensor:
        """The step's logits, by a run that also makes ready what may not be made while recording."""

        def run() -> Tensor:
            slots_T, keys_T = self._numbers_4R[2, :width], self._numbers_4R[3, :width].int()
            tables = DecodeTables(slots_T, self._blocks_RB[:width], keys_T)
            context = self._make_step(self._cache, tables)
            return run_rows(self._model, context, self._numbers_4R[:1, :width], self._numbers_4R[1:2, :width])

        if slots:  # The row table that was in use before does not come back.
            self._graphs = {other: graph for other, graph in self._graphs.items() if not graph.slots}
        logits_TV = run()
        tell = self._adapters.recorded()
        self._adapters.forget_forward()
        try:
            replay = self._record(run)
        except RuntimeError:
            _log.warning("decode steps like this one run without a CUDA graph", exc_info=True)
        else:
            self._graphs[key] = _Graph(replay, slots, self._adapters.recorded())
        tell()
        return logits_TV

    def _fill(self, batch: Batch, width: int) -> None:
        size = self._cache.block_size
        positions = [rows.start for rows in batch.sequences]
        slots = [
            rows.block_table[position // size] * size + position % size
            for rows, position in zip(batch.sequences, positions, strict=True)
        ]
        padding = width - len(positions)
        numbers = [
            [*batch.token_ids, *[0] * padding],
            [*positions, *[0] * padding],
            [*slots, *(number % size for number in range(padding))],  # Block 0 is no sequence's.
            [*(position + 1 for position in positions), *[0] * padding],
        ]
        self._numbers_4R[:, :width].copy_(torch.tensor(numbers))
        self._place([rows.block_table for rows in batch.sequences])

    def _place(self, tables: Sequence[tuple[int, ...]]) -> None:
        changed = [row for row, table in enumerate(tables) if self._tables[row] != table]
        if not changed:
            return
        width = max(len(tables[row]) for row in changed)
        padded = [(*tables[row], *(0,) * (width - len(tables[row]))) for row in changed]
        device = self._cache.device
        rows_N = torch.tensor(changed, device=device)
        self._blocks_RB[rows_N, :width] = torch.tensor(padded, dtype=torch.int32, device=device)
        for row in changed:
            self._tables[row] = tables[row]


def graphs_for(
    prepared: PreparedModel, cache: KVCache, adapters: RecordableAdapters, limits: tuple[int, int]
) -> DecodeGraphs | None:
    """None where steps cannot be recorded: without a GPU, or where the kernel of attention does not give here
    what `PagedStep` does. Needs Triton. ``limits`` as `DecodeGraphs`."""
    if cache.device.type != "cuda":
        return None
    layers, shapes = prepared.probed.layers, prepared.probed.kv_shapes
    scores = {Scores(layer.softcap is not None, layer.has_sinks) for layer in layers}
    # Triton is not installed everywhere.
    from triton.errors import TritonError

    from timbre_server.engine.paged_decode import DecodeStep, can_attend

    try:
        agree = all(map(can_attend, shapes)) and agrees(DecodeStep.of, cache, shapes, _CHECKED, scores)
    except (TritonError, RuntimeError, OSError, ValueError):
        _log.warning("attention's kernel for recorded steps fails here", exc_info=True)
        agree = False
    _log.info("decode steps: %s", "recorded as CUDA graphs" if agree else "launched one by one")
    if not agree:
        return None
    return DecodeGraphs(prepared.loaded.model, cache, adapters, DecodeStep, CudaRecord(), limits)


def kept_bytes(max_rows: int, vocab_size: int) -> int:
    """What recordings keep at most: each the logits that it gives, one for each padded number of rows and one
    with adapters."""
    widths = {_padded(num_rows) for num_rows in range(1, max_rows + 1)}
    return (sum(widths) + max_rows) * vocab_size * torch.float32.itemsize


def _padded(num_rows: int) -> int:
    many = -(-num_rows // MANY_ROWS) * MANY_ROWS
    return next((count for count in PADDED_ROWS if count >= num_rows), many)


class CudaRecord:
    """`Record` by CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # A pool ends with its last graph, and nothing can be recorded into it afterwards: this one stays.
        self._keeper = self._recorded(partial(torch.zeros, 1, device="cuda"))

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph, out = self._recorded(run)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _recorded(self, run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Adapters arrive on a thread of their own meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            out = run()
        return graph, out
