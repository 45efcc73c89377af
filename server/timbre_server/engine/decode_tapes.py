"""Decode steps on a CPU as tapes (`native.tape`): what one step calls is written down and called again for
those of as many rows.

Tokens and positions lie in tensors that stay where they are, and attention is told anew whose rows a step
has. What adapters do is decided each time that a tape is played, so one tape serves any of them: those on
parameters and in attention alone run as usual. The first step that is played also runs as usual, and if the
two differ in a bit there are no tapes.

Legend: T rows, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from timbre_server.engine.batch import Batch, forward, run_rows
from timbre_server.engine.decode_graphs import RecordableAdapters
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.native_attention import NativeDecode, NativeStep
from timbre_server.native.arena import Arena
from timbre_server.native.recording import Recording
from timbre_server.native.tape import Tape

MOST_ROWS = 64
"""Of a step that is recorded: beside more rows Python takes little, and each number of rows has its tape."""

_REFUSALS: tuple[type[Exception], ...] = (AttributeError, RuntimeError, TypeError, ValueError)
"""`NotRepeatable`, and what is raised by operations that do not run so."""

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _DecodeTape:
    """For steps of so many rows."""

    numbers_2T: Tensor
    """Tokens and positions."""
    context: NativeDecode
    tape: Tape
    logits_TV: Tensor

    def play(self, step: NativeStep, numbers_2T: Tensor) -> None:
        self.context.begin(step)
        self.numbers_2T.copy_(numbers_2T)
        self.tape()


class DecodeTapes:
    """The recordings of one model."""

    def __init__(self, model: PreTrainedModel, cache: KVCache, adapters: RecordableAdapters) -> None:
        self._model, self._cache, self._adapters = model, cache, adapters
        self._arena = Arena()
        self._tapes: dict[int, _DecodeTape] = {}
        """By number of rows."""
        self._is_off = False
        self._are_proven = False
        """Whether one was compared."""

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits [T, V] of a decode step, float32, valid until the next; None: run it as usual.

        The adapters' rows are set. Call it under ``torch.inference_mode()``.
        """
        num_rows = len(batch.token_ids)
        is_served = not self._is_off and num_rows <= MOST_ROWS and batch.is_decode
        if not is_served or self._adapters.act_beside_layers:
            return None
        step = NativeStep(self._cache, batch.sequences)
        positions = [rows.start for rows in batch.sequences]
        numbers_2T = torch.tensor([batch.token_ids, positions])
        own = self._tapes.get(num_rows)
        if own is None or not self._are_proven:
            return self._tried(own, step, numbers_2T, batch)
        own.play(step, numbers_2T)
        return own.logits_TV

    def _tried(self, own: _DecodeTape | None, step: NativeStep, numbers_2T: Tensor, batch: Batch) -> Tensor:
        """A step that is recorded, or the first that is played; whatever comes of it, its logits."""
        why = "a step that was played gives other logits than the model"
        try:
            if own is None:
                return self._recorded(step, numbers_2T)
            own.play(step, numbers_2T)
        except _REFUSALS as error:
            own, why = None, str(error)
        self._adapters.forget_forward()
        # What fails here fails without tapes.
        want_TV = forward(self._model, self._cache, batch, step=NativeStep)
        self._are_proven = own is not None and torch.allclose(
            own.logits_TV, want_TV, rtol=0, atol=0, equal_nan=True
        )
        if not self._are_proven:
            _log.warning("decode steps run without tapes: %s", why)
            self._is_off = True
            self._tapes.clear()
        return want_TV

    def _recorded(self, step: NativeStep, numbers_2T: Tensor) -> Tensor:
        """Logits of the step, which has run."""
        context = NativeDecode(self._cache, numbers_2T.shape[1])
        context.begin(step)
        run = partial(run_rows, self._model, context, numbers_2T[:1], numbers_2T[1:])
        tape, logits_TV = Recording.of(run, self._arena)
        self._tapes[numbers_2T.shape[1]] = _DecodeTape(numbers_2T, context, tape, logits_TV)
        return logits_TV
