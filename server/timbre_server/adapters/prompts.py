"""What prompt adapters put into a step: the embeddings of its virtual rows, or their keys and values.

Virtual rows hold a placeholder token. A hook on the base's embedding layer overwrites what it puts out for
them; or attention is given the adapter's keys and values in place of theirs, before they go into the cache,
and whatever else was computed for them is read by nobody. Adapters that add an attention of their own do so
on every row of theirs.

Legend: T rows of the step, N some of them, V virtual tokens, D hidden size, A attention layers, H query
heads, G KV heads, M query heads of one KV head, E size of a head, L keys of an adapter's own attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.prompt_parts import AttentionPrompt, Prompt, PromptEmbeddings, PromptEntries
from timbre_server.operators.row_table import RowTable, Segment


@dataclass(frozen=True, slots=True, eq=False)
class VirtualRows:
    """Rows ``rows`` of the step stand for the virtual tokens ``tokens`` of a prompt."""

    rows: slice
    tokens: slice
    prompt: Prompt


class StepPrompts:
    """The virtual rows of the step that is running; none between steps."""

    def __init__(self, programs: Mapping[int, AdapterProgram], embedding: nn.Module | None) -> None:
        self._programs = programs
        self._virtual: tuple[VirtualRows, ...] = ()
        self._attending: dict[int, list[tuple[Segment, AttentionPrompt]]] = {}
        if embedding is not None:
            embedding.register_forward_hook(self._embedded)

    def begin(self, table: RowTable) -> None:
        self._virtual = tuple(_virtual_rows(table, self._programs))
        self._attending = {}
        if any(self._programs[slot].attention for slot in table.slots):
            for segment in table.segments:
                for layer, prompt in self._programs[segment.slot].attention.items():
                    self._attending.setdefault(layer, []).append((segment, prompt))

    def end(self) -> None:
        self._virtual = ()
        self._attending = {}

    @property
    def act_in_attention(self) -> bool:
        """Whether `entries` or `attended` would change anything."""
        return bool(self._attending) or any(isinstance(v.prompt, PromptEntries) for v in self._virtual)

    @property
    def act(self) -> bool:
        """Whether anything is another one for them: embeddings, or what `act_in_attention`."""
        return bool(self._attending or self._virtual)

    def entries(self, layer: int, k_GTE: Tensor, v_GTE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, those of virtual rows as their adapters have them; all in copies."""
        prompts = [(v.rows, v.tokens, v.prompt) for v in self._virtual if isinstance(v.prompt, PromptEntries)]
        keys = [(rows, prompt.keys_AVGE[layer, tokens]) for rows, tokens, prompt in prompts]
        values = [(rows, prompt.values_AVGE[layer, tokens]) for rows, tokens, prompt in prompts]
        return _replaced(k_GTE, keys), _replaced(v_GTE, values)

    def attended(self, layer: int, q_HTE: Tensor, out_THE: Tensor) -> Tensor:
        """A layer's attention with what adapters add to it, in place; ``q_HTE`` as attention took it."""
        for segment, prompt in self._attending.get(layer, ()):
            added_NHE = attention_change(prompt, q_HTE[:, segment.index]) * segment.weights_N.view(-1, 1, 1)
            out_THE[segment.index] = (out_THE[segment.index].float() + added_NHE).to(out_THE.dtype)
        return out_THE

    def _embedded(self, module: nn.Module, args: Any, out_1TD: Tensor) -> Tensor | None:
        """The embedding layer's output with the virtual rows' own; None: as it is."""
        rows = [
            (v.rows, v.prompt.rows_VD[v.tokens].unsqueeze(1))
            for v in self._virtual
            if isinstance(v.prompt, PromptEmbeddings)
        ]
        return _replaced(out_1TD, rows) if rows else None


def attention_change(prompt: AttentionPrompt, q_HNE: Tensor) -> Tensor:
    """``softmax(q K^T / sqrt(E)) V`` for rows that all use one prompt: [N, H, E], float32."""
    num_kv_heads, _, size = prompt.keys_GLD.shape
    q_GMNE = q_HNE.float().reshape(num_kv_heads, -1, *q_HNE.shape[1:])
    scores_GMNL = (q_GMNE @ prompt.keys_GLD.transpose(1, 2).unsqueeze(1)) * size**-0.5
    out_GMNE = torch.softmax(scores_GMNL, dim=-1) @ prompt.values_GLE.unsqueeze(1)
    return out_GMNE.flatten(0, 1).transpose(0, 1)


def _virtual_rows(table: RowTable, programs: Mapping[int, AdapterProgram]) -> list[VirtualRows]:
    found, row = [], 0
    for span in table.spans:
        if span.virtual_from is not None:
            ((slot, _),) = span.pairs
            prompt = programs[slot].prompt
            assert prompt is not None, "virtual rows of an adapter without virtual tokens"
            first, last = span.virtual_from, span.virtual_from + span.num_rows
            found.append(VirtualRows(slice(row, row + span.num_rows), slice(first, last), prompt))
        row += span.num_rows
    return found


def _replaced(x_GTE: Tensor, rows: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """One copy with other values [V, G, E] in some rows, rounded to x's dtype; x itself without any."""
    if not rows:
        return x_GTE
    copied_GTE = x_GTE.clone()
    for where, values_VGE in rows:
        copied_GTE[:, where] = values_VGE.transpose(0, 1).to(x_GTE.dtype)
    return copied_GTE
