"""Steps on a CPU as tapes (`native.tape`): what a step calls is written down once, and called again for each
step of as many rows or fewer, whatever they are.

There is one tape of the layers for steps of few rows, one for all others, and one of the head that makes
logits of the rows that are kept. Tokens and positions lie in tensors that stay where they are, and attention
is told anew whose rows a step has. What adapters do is decided each time that a tape is played, so one tape
serves any of them: steps whose adapters act on parameters, in attention or by virtual tokens run as usual. So
does the first step of several rows that a tape plays, and the first of one row, since models may treat that
otherwise; if played and run differ in a bit there are no tapes.

Legend: T rows, K kept ones, D hidden features, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from timbre_server.engine.batch import Batch, forward
from timbre_server.engine.context import active
from timbre_server.engine.decode_graphs import RecordableAdapters
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.native_attention import NativeStep, PlayedSteps
from timbre_server.native.arena import Arena
from timbre_server.native.recording import Recording
from timbre_server.native.rows import Rows, counts_rows

FEW_ROWS = 64
"""What steps have that decode, for the most part."""

_REFUSALS: tuple[type[Exception], ...] = (AttributeError, RuntimeError, TypeError, ValueError)
"""`NotRepeatable`, and what is raised by operations that do not run so."""

_log = logging.getLogger(__name__)


class StepTapes:
    """The recordings of one model, made at once: nobody waits for them later."""

    def __init__(
        self, model: PreTrainedModel, cache: KVCache, adapters: RecordableAdapters, most_rows: int
    ) -> None:
        """``most_rows``: of any step."""
        self._model, self._cache, self._adapters = model, cache, adapters
        self._layers: list[_Layers] = []
        """By how many rows they have room for."""
        try:
            with torch.inference_mode():
                for limit in sorted({min(FEW_ROWS, most_rows), most_rows}):
                    self._layers.append(_Layers(model, cache, _num_rows(model, limit)))
                self._head = _Head(model, _num_rows(model, FEW_ROWS), self._layers[0].hidden_1TD.whole)
        except _REFUSALS as error:
            self._give_up(str(error))

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [K, V] of a step's kept rows, float32, valid until the next; None: run it as usual.

        The adapters' rows are set. Call it under ``torch.inference_mode()``.
        """
        num_rows = len(batch.token_ids)
        layers = next((layers for layers in self._layers if num_rows <= layers.most_rows), None)
        if layers is None or self._adapters.act_beside_layers:
            return None
        if (num_rows == 1) in layers.proven:
            return self._played(layers, batch)
        return self._compared(layers, batch) if batch.kept_rows else None

    def _played(self, layers: _Layers, batch: Batch) -> Tensor:
        return self._head.play(layers.play(batch), torch.tensor(batch.kept_rows, dtype=torch.int64))

    def _compared(self, layers: _Layers, batch: Batch) -> Tensor:
        """Logits of a step that is played, and then run as usual."""
        found_KV, why = None, "a step that was played gives other logits than the model"
        try:
            found_KV = self._played(layers, batch)
        except _REFUSALS as error:
            why = str(error)
        self._adapters.forget_forward()
        # What fails here fails without tapes.
        want_KV = forward(self._model, self._cache, batch, step=NativeStep)
        if found_KV is not None and torch.allclose(found_KV, want_KV, rtol=0, atol=0, equal_nan=True):
            layers.proven.add(len(batch.token_ids) == 1)
        else:
            self._give_up(why)
        return want_KV

    def _give_up(self, why: str) -> None:
        _log.warning("steps run without tapes: %s", why)
        self._layers.clear()


class _Layers:
    """Of a model, up to what its head reads."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, num_rows: int) -> None:
        """Raises: `_REFUSALS`."""
        self.most_rows = num_rows
        self.proven = set[bool]()
        """Whether a step was compared, of one row (True) and of several."""
        self._cache = cache
        self._context = PlayedSteps(cache)
        numbers_2T = torch.zeros(2, num_rows, dtype=torch.int64)
        self._numbers_2T = Rows(numbers_2T, num_rows)
        """Tokens and positions."""

        def run() -> Tensor:
            with active(self._context):
                output = model.base_model(
                    input_ids=numbers_2T[:1], position_ids=numbers_2T[1:], use_cache=False
                )
            hidden_1TD: Tensor = output.last_hidden_state
            return hidden_1TD

        self._tape, self.hidden_1TD = Recording.of(run, Arena(), num_rows)

    def play(self, batch: Batch) -> Tensor:
        positions = [p for rows in batch.sequences for p in range(rows.start, rows.end)]
        num_rows = len(positions)
        self._context.begin(NativeStep(self._cache, batch.sequences))
        self._numbers_2T(num_rows).copy_(torch.tensor([batch.token_ids, positions]))
        self._tape(num_rows)
        return self.hidden_1TD(num_rows)


class _Head:
    """What makes logits of what the layers give."""

    def __init__(self, model: PreTrainedModel, num_rows: int, like_1TD: Tensor) -> None:
        """Raises: `_REFUSALS`."""
        self._model, self._num_rows = model, num_rows
        self._token_11 = torch.zeros(1, 1, dtype=torch.int64)
        """The model asks for some, and reads none."""
        hidden_1KD = like_1TD.new_zeros(1, num_rows, like_1TD.shape[2])
        self._hidden_1KD = Rows(hidden_1KD, num_rows)
        self._tape, self._logits_KV = Recording.of(partial(self._run, hidden_1KD), Arena(), num_rows)

    def play(self, hidden_1TD: Tensor, kept_rows_K: Tensor) -> Tensor:
        """More rows than the tape has run as usual; none, as in the midst of a prompt, need no head."""
        num_kept = len(kept_rows_K)
        if not num_kept:
            return self._logits_KV(0)
        if num_kept > self._num_rows:
            return self._run(hidden_1TD.index_select(1, kept_rows_K))
        torch.index_select(hidden_1TD, 1, kept_rows_K, out=self._hidden_1KD(num_kept))
        self._tape(num_kept)
        return self._logits_KV(num_kept)

    def _run(self, hidden_1KD: Tensor) -> Tensor:
        with _gives(self._model, hidden_1KD):
            output = self._model(input_ids=self._token_11, use_cache=False)
        logits_KV: Tensor = output.logits[0].float()
        return logits_KV


@contextmanager
def _gives(model: PreTrainedModel, hidden_1KD: Tensor) -> Iterator[None]:
    """The model's layers do not run; this is what they have given."""
    layers = model.base_model
    before = vars(layers).get("forward")
    layers.forward = lambda *_, **__: BaseModelOutputWithPast(last_hidden_state=hidden_1KD)
    try:
        yield
    finally:
        if before is None:
            del layers.forward
        else:
            layers.forward = before


def _num_rows(model: PreTrainedModel, least: int) -> int:
    """What `Recording` asks for: a prime that divides no size of the model divides no product of them."""
    sizes = {size for own in (*model.parameters(), *model.buffers()) for size in own.shape}
    return next(
        number
        for number in count(least)
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1))
        and not any(counts_rows(size, number) for size in sizes)
    )
