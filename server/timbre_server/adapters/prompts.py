"""What prompt adapters put into a step: the embeddings of its virtual rows.

Virtual rows hold a placeholder token; a hook on the base's embedding layer overwrites what it puts out for
them. Knows no attention and no cache.

Legend: T rows of the step, V virtual tokens, N some of them, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Prompt
from timbre_server.operators.row_table import RowTable


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
        if embedding is not None:
            embedding.register_forward_hook(self._embedded)

    def begin(self, table: RowTable) -> None:
        self._virtual = tuple(_virtual_rows(table, self._programs))

    def end(self) -> None:
        self._virtual = ()

    def _embedded(self, module: nn.Module, args: Any, out_1TD: Tensor) -> Tensor | None:
        """The embedding layer's output with the virtual rows' own; None: as it is."""
        if not self._virtual:
            return None
        replaced_1TD = out_1TD.clone()
        for each in self._virtual:
            replaced_1TD[0, each.rows] = each.prompt.rows_VD[each.tokens].to(out_1TD.dtype)
        return replaced_1TD


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
