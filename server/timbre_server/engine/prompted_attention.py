"""Attention of a step in which prompt adapters take part, around that of any other context.

What they put in is `adapters.prompts`' business; where it goes in is written here.

Legend: T rows, H query heads, G KV heads, D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from timbre_server.engine.context import AttentionCall, AttentionContext


class AttentionPrompts(Protocol):
    """What adapters do in the attention of the running step."""

    def entries(self, layer: int, k_GTD: Tensor, v_GTE: Tensor, /) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to and to keep."""
        ...

    def attended(self, layer: int, q_HTD: Tensor, out_THE: Tensor, /) -> Tensor:
        """The output with what adapters add to it; ``out_THE`` may be changed."""
        ...


@dataclass(frozen=True, slots=True)
class PromptedAttention:
    inner: AttentionContext
    prompts: AttentionPrompts

    def attend(self, call: AttentionCall) -> Tensor:
        k_GTD, v_GTE = self.prompts.entries(call.layer, call.k_GTD, call.v_GTE)
        out_THE = self.inner.attend(replace(call, k_GTD=k_GTD, v_GTE=v_GTE))
        return self.prompts.attended(call.layer, call.q_HTD, out_THE)
