"""What the routers of the running step have given: for the sites below a block, and for whoever asks after.

Legend: N rows of one adapter, E experts, P copies of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from timbre_methods.routing import Router
from timbre_server.operators.row_table import RowTable, Segment


@dataclass(frozen=True, slots=True, eq=False)
class RouterCall:
    """One router's gates ``gates_NE`` for the rows of a segment, which ``table`` counts."""

    router: Router
    table: RowTable
    segment: Segment
    gates_NE: Tensor


class StepRouting:
    """Empty between steps."""

    def __init__(self) -> None:
        self._chosen: dict[Router, Tensor] = {}
        self.calls: list[RouterCall] = []
        self.rows_of_copies: dict[RowTable, Tensor] = {}
        """Of tables that count copies of the step's rows: the row of each, [P]."""

    def choose(self, router: Router, gates_NE: Tensor) -> None:
        """A block has chosen for the sites below it, until `block_ends`; in the order of its adapter's rows
        in the table that holds there."""
        self._chosen[router] = gates_NE

    def chosen(self, router: Router, num_rows: int) -> Tensor:
        """``[N, E]``. Without a block that has chosen, each expert acts: the meaning of a site alone."""
        gates_NE = self._chosen.get(router)
        if gates_NE is None:
            return router.weight_EI.new_ones(num_rows, router.num_experts)
        assert len(gates_NE) == num_rows, "a block chose for other rows than its sites have"
        return gates_NE

    def block_ends(self) -> None:
        self._chosen.clear()

    def note(self, call: RouterCall) -> None:
        """Keeps what a router gave until the step ends; nothing is computed."""
        self.calls.append(call)

    def end_step(self) -> None:
        self._chosen.clear()
        self.calls.clear()
        self.rows_of_copies.clear()
