"""A base model whose linear layers apply adapters: what the runner sees of them.

Knows neither digests nor files nor requests: programs live in numbered slots, and a row table says which
rows use which slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_server.adapters.adapted_linear import ActiveRows, AdaptedGroup, AdaptedLinear
from timbre_server.adapters.groups import LinearGroup
from timbre_server.adapters.prompts import StepPrompts
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.row_table import RowTable


class AdaptedModel:
    """The layers of one model in adapted form, and the programs that they apply."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[LinearGroup],
        product_of: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda module: module,
        embedding: nn.Module | None = None,
    ) -> None:
        """Replace the layers of ``groups`` in place. ``product_of`` gives the fastest ``W x + b`` of one;
        without ``embedding``, the base's layer of token embeddings, no adapter may bring virtual tokens."""
        self._programs: dict[int, AdapterProgram] = {}
        self._prompts = StepPrompts(self._programs, embedding)
        self._body_rows = ActiveRows()
        self._head_rows = ActiveRows()
        self._groups: list[AdaptedGroup] = []
        operators = {operator.part: operator for operator in all_operators()}
        for group in groups:
            rows = self._head_rows if group.is_head else self._body_rows
            adapted = AdaptedGroup(group.paths, rows, self._programs, operators)
            self._groups.append(adapted)
            for member, path in enumerate(group.paths):
                base = model.get_submodule(path)
                parent, _, name = path.rpartition(".")
                layer = AdaptedLinear(base, product_of(base), adapted, member)
                setattr(model.get_submodule(parent), name, layer)

    @property
    def attention_prompts(self) -> StepPrompts | None:
        """What adapters do in the attention of the rows that are set; None: nothing."""
        return self._prompts if self._prompts.act_in_attention else None

    def set_rows(self, table: RowTable, head_table: RowTable) -> None:
        """The rows of the next forward, and those of them whose logits are kept."""
        self._body_rows.begin(table)
        self._head_rows.begin(head_table)
        self._prompts.begin(table)

    def clear_rows(self) -> None:
        """The forward has ended, well or not: base rows until told otherwise, nothing kept of its inputs."""
        self._body_rows.end()
        self._head_rows.end()
        self._prompts.end()
        for group in self._groups:
            group.end_step()

    def put(self, slot: int, program: AdapterProgram) -> None:
        """Let a free slot hold a program whose tensors are on the model's device."""
        self._programs[slot] = program

    def drop(self, slot: int) -> None:
        """Free a slot's tensors, also where they were prepared for a table."""
        del self._programs[slot]
        for group in self._groups:
            group.forget()
