"""`Diagonal`: element-wise gain and shift, on the input or on the base's output.

Rows of one span have equal gains, so the weighted gains are summed once for each distinct mix of the table
(not each row), and a row looks its own up.

Legend: T rows of the batch, N rows that have a gain, M distinct mixes, P parts, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_server.operators import pooling
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.row_table import Pairs, RowTable


class DiagonalOperator(Operator[Diagonal]):
    part = Diagonal

    def meaning(self, part: Diagonal, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        if part.side == "input":
            return Meaning(input_change_TI=(part.gain - 1) * x_TI)
        shift = 0 if part.shift is None else part.shift
        return Meaning(change_TO=(part.gain - 1) * y_TO + shift)

    def bind(self, uses: Uses[Diagonal], table: RowTable) -> Bound:
        return BoundDiagonal(
            [gains_of(parts, "input", table) for parts in uses],
            [gains_of(parts, "output", table) for parts in uses],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gains:
    """``change[rows_N] = extra_gain_MD[mix_N] ∘ v + shift_MD[mix_N]``; rows None: all, in order."""

    rows_N: Tensor | None
    mix_N: Tensor
    extra_gain_MD: Tensor
    shift_MD: Tensor | None

    def change(self, v_TD: Tensor) -> Change:
        v_ND = v_TD if self.rows_N is None else v_TD[self.rows_N]
        values = self.extra_gain_MD[self.mix_N] * v_ND
        if self.shift_MD is not None:
            values += self.shift_MD[self.mix_N]
        return Change(values, self.rows_N)


def gains_of(parts_by_slot: Mapping[int, Sequence[Diagonal]], side: str, table: RowTable) -> Gains | None:
    """The summed gains of every span that has one on this side, or None."""
    on_side = {
        slot: own
        for slot in table.slots
        if (own := [p for p in parts_by_slot.get(slot, ()) if p.side == side])
    }
    if not on_side:
        return None
    mixes, mix_of_row = _distinct_mixes(table, on_side)
    uses = [
        (mix, weight, part)
        for pairs, mix in mixes.items()
        for slot, weight in pairs
        for part in on_side[slot]
    ]
    parts = [part for _, _, part in uses]
    mix_P = torch.tensor([mix for mix, _, _ in uses], device=table.device)
    weights_P1 = torch.tensor([weight for _, weight, _ in uses], device=table.device).unsqueeze(1)

    def summed(values: Sequence[Tensor], less: float) -> Tensor:
        # Not a product with a matrix of weights: there a mix would meet 0 times another's infinity.
        sums_MD = values[0].new_zeros(len(mixes), len(values[0]))
        step = max(1, pooling.MAX_POOLED_BYTES // values[0].nbytes)
        for start in range(0, len(values), step):
            piece = slice(start, start + step)
            values_PD = torch.stack(list(values[piece])) - less
            sums_MD.index_add_(0, mix_P[piece], values_PD * weights_P1[piece])
        return sums_MD

    shift_MD = None
    if any(part.shift is not None for part in parts):
        none_D = torch.zeros_like(parts[0].gain)
        shift_MD = summed([none_D if part.shift is None else part.shift for part in parts], 0.0)
    return Gains(
        table.rows_using(on_side),
        torch.tensor(mix_of_row, device=table.device),
        summed([part.gain for part in parts], 1.0),
        shift_MD,
    )


def _distinct_mixes(table: RowTable, slots: Collection[int]) -> tuple[dict[Pairs, int], list[int]]:
    """The mixes of these slots by number, and the number of each row that has one."""
    mixes: dict[Pairs, int] = {}
    mix_of_row: list[int] = []
    for span in table.spans:
        pairs = tuple((slot, weight) for slot, weight in span.pairs if slot in slots)
        if pairs:
            mix_of_row.extend([mixes.setdefault(pairs, len(mixes))] * span.num_rows)
    return mixes, mix_of_row


class GainChanges(Protocol):
    """What the gains of all adapters do at one side of one member."""

    def change(self, v_TD: Tensor, /) -> Change: ...


class BoundDiagonal(Bound):
    """By whatever computes the gains' changes, of each member of a group."""

    def __init__(self, inputs: Sequence[GainChanges | None], outputs: Sequence[GainChanges | None]) -> None:
        self._inputs = inputs
        self._outputs = outputs

    @property
    def reads_input_alone(self) -> bool:
        return False

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        gains = self._inputs[member]
        return None if gains is None else gains.change(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        gains = self._outputs[member]
        return None if gains is None else gains.change(y_TO)
