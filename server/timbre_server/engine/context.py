"""What the model's attention layers need to know of the running step, without an extra model argument.

A forward pass runs inside `active(context)`; the attention function that transformers calls looks the
context up with `current()`. The context is set for the running thread only and is taken away when the
block is left, also by an exception: stale slots would corrupt other requests' cache.

Knows nothing of models, tensors' meaning or scheduling: two kinds of context exist, the probe's
(`probe.Recording`) and a step's (`paged_attention.PagedStep`).

Legend: T rows, H query heads, G KV heads, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's call, stripped of the batch dimension of 1.

    Query head ``h`` reads KV head ``h // (H / G)``. Row ``t`` sees keys up to its own position and, with
    a ``window``, only the last ``window`` of them, itself included.
    """

    layer: int
    q_HTD: Tensor
    k_GTD: Tensor
    v_GTE: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    """Scores become ``softcap * tanh(score / softcap)`` before the mask."""
    sinks_H: Tensor | None = None
    """One more score for each head that takes part in the softmax and has no value."""


class AttentionContext(Protocol):
    def attend(self, call: AttentionCall) -> Tensor:
        """The attention output, [T, H, E]. Reads and may write the KV cache."""
        ...


_ACTIVE: ContextVar[AttentionContext | None] = ContextVar("timbre_attention_context", default=None)


@contextmanager
def active(context: AttentionContext) -> Iterator[None]:
    """Let the attention layers of this thread use ``context`` until the block is left, however it is left."""
    token = _ACTIVE.set(context)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def current() -> AttentionContext:
    """The running step's context.

    Raises:
        RuntimeError: the model was called outside `active`.
    """
    context = _ACTIVE.get()
    if context is None:
        raise RuntimeError(
            "the model's attention was called outside a step: no context is active. "
            "Run the forward pass through engine.batch.forward."
        )
    return context
