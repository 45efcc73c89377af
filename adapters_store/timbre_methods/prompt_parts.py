"""What adapters do outside of the base's layers: virtual tokens, and an attention of their own.

Like `program`, whose vocabulary this extends, plain dataclasses of tensors.

Legend: V virtual tokens, D hidden size, A attention layers, G KV heads, E size of a head (D of its keys),
L keys of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PromptEmbeddings:
    """Virtual tokens by their embeddings: ``rows_VD`` [V, D] float32, in place of what the base's own
    embedding layer puts out."""

    rows_VD: Tensor

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.rows_VD.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class PromptEntries:
    """Virtual tokens by their KV entries in every attention layer, as the cache takes them: no position is
    turned into the keys. ``keys_AVGE`` and ``values_AVGE`` [A, V, G, E], float32."""

    keys_AVGE: Tensor
    values_AVGE: Tensor

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.keys_AVGE.shape[1]


Prompt = PromptEmbeddings | PromptEntries


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPrompt:
    """One attention layer's output, before its output projection, ``+= softmax(q K^T / sqrt(D)) V`` for each
    head, with q as that layer's attention takes it (rotated, where it is). The softmax is over these keys
    alone; a gate is in the values already. ``keys_GLD`` [G, L, D], ``values_GLE`` [G, L, E], float32."""

    keys_GLD: Tensor
    values_GLE: Tensor
