"""The rows of the step that is running, as the base's adapted layers see them.

Legend: T rows, P copies of them, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_server.operators.contract import Change
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.row_table import Pairs, RowTable


class ActiveRows:
    """The row table of the step that is running; None between steps and for a step of base rows only.

    While steps repeat a table they get the very same object, so that groups know it by identity.
    """

    def __init__(self) -> None:
        self.table: RowTable | None = None
        self.copies: RowCopies | None = None
        """While a block runs that sees its rows several times, and ``table`` is of those."""
        self.merged_pairs: Pairs = ()
        """Of the adapters that are merged, if any."""
        self.are_merged = False
        """Whether these are all of the step's rows: to merged weights they are base rows."""
        self._last: RowTable | None = None
        self._begun: tuple[RowTable | None, bool] | None = None
        self.live = LiveRows()
        """For what outlasts tables: whoever binds it shows them the one that runs."""

    def begin(self, table: RowTable) -> bool:
        """Whether layers see another one than in the step before."""
        before = self._begun
        self.are_merged = bool(self.merged_pairs) and table.only_pairs == self.merged_pairs
        if self.are_merged or not table.slots:
            self.table = None
        else:
            if self._last is None or self._last.signature != table.signature:
                self._last = table
            self.table = self._last
        self._begun = self.table, self.are_merged
        return self._begun != before

    def forget(self) -> None:
        """What the next step sees is another one, whatever it is: an adapter has left."""
        self._begun = None

    @contextmanager
    def copied(self, copies: RowCopies, table: RowTable) -> Iterator[None]:
        """A block in which rows are copies, and the table is of those."""
        own = self.table
        assert own is not None, "copies of no rows"
        self.copies, self.table = copies, table
        # What is bound to either may be so since a step before.
        self.live.show(table)
        try:
            yield
        finally:
            self.copies, self.table = None, own
            self.live.show(own)

    def end(self) -> None:
        self.table = self.copies = None
        self.are_merged = False


class StepRows:
    """Those of one step as each kind of layer sees them: a norm may have several for each token, and the head
    those alone whose logits are kept."""

    def __init__(self, rows_per_token: Iterable[int]) -> None:
        self.by_rows_per_token = {count: ActiveRows() for count in (1, *rows_per_token)}
        self.body = self.by_rows_per_token[1]
        self.head = ActiveRows()
        self._all = *self.by_rows_per_token.values(), self.head

    def begin(self, table: RowTable, head_table: RowTable) -> bool:
        """Whether any layers see others than in the step before."""
        are_new = [rows.begin(table.times(count)) for count, rows in self.by_rows_per_token.items()]
        return any([*are_new, self.head.begin(head_table)])

    def forget(self) -> None:
        for rows in self._all:
            rows.forget()

    def end(self) -> None:
        for rows in self._all:
            rows.end()

    def merge(self, pairs: Pairs) -> None:
        """These adapters' weights are merged from now on."""
        for rows in self._all:
            rows.merged_pairs = pairs


@dataclass(slots=True, eq=False)
class RowCopies:
    """A block's rows, several times: copy p is row ``row_P[p]`` of ``x_1TD``, and its block's output counts
    ``gate_P[p]`` times.

    What the base alone does to equal rows is computed once for all of them, before the copies part and, at
    the block's ``last`` layer, after they meet.
    """

    x_1TD: Tensor
    x_1PD: Tensor
    row_P: Tensor
    gate_P: Tensor
    last: str | None
    have_met: bool = False

    def meet(self, v_1PD: Tensor) -> Tensor:
        """Back to the rows: the weighted sums, in float32."""
        sums_TD = torch.zeros(self.x_1TD.shape[1], v_1PD.shape[-1], device=v_1PD.device)
        sums_TD.index_add_(0, self.row_P, v_1PD.flatten(0, -2).float() * self.gate_P.unsqueeze(1))
        return sums_TD.unsqueeze(0)

    def bias_change(self, bias_O: Tensor) -> Change:
        """What the copies' biases sum to, beyond the one that a product of the rows has."""
        gates_T1 = self.gate_P.new_full((self.x_1TD.shape[1], 1), -1.0)
        gates_T1.index_add_(0, self.row_P, self.gate_P.unsqueeze(1))
        return Change(gates_T1 * bias_O.float())

    def met(self, change: Change) -> Change:
        """A change of copies as one of rows."""
        row_N, gate_N = self.row_P, self.gate_P
        if change.rows_N is not None:
            row_N, gate_N = row_N[change.rows_N], gate_N[change.rows_N]
        return Change(change.values_NO * gate_N.unsqueeze(1), row_N)
