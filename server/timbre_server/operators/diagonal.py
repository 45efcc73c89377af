"""`Diagonal`: element-wise gain and shift, on the input or on the base's output.

Rows of one span have equal gains, so the weighted gains are summed once for each distinct mix of the table
(not each row), and a row looks its own up.

Legend: T rows of the batch, N rows that have a gain, M distinct mixes, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.program import Diagonal
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
        return _BoundDiagonal(
            [_gains(parts, "input", table) for parts in uses],
            [_gains(parts, "output", table) for parts in uses],
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Gains:
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


def _gains(parts_by_slot: Mapping[int, Sequence[Diagonal]], side: str, table: RowTable) -> _Gains | None:
    """The summed gains of every span that has one on this side, or None."""
    rows: list[int] = []
    mixes: list[int] = []
    distinct: dict[Pairs, int] = {}
    start = 0
    for span in table.spans:
        pairs = tuple(
            (slot, weight)
            for slot, weight in span.pairs
            if any(part.side == side for part in parts_by_slot.get(slot, ()))
        )
        if pairs:
            rows.extend(range(start, start + span.num_rows))
            mixes.extend([distinct.setdefault(pairs, len(distinct))] * span.num_rows)
        start += span.num_rows
    if not distinct:
        return None
    summed = [_sum(parts_by_slot, side, pairs) for pairs in distinct]
    some_shift = any(shift is not None for _, shift in summed)
    device = table.device
    return _Gains(
        None if len(rows) == table.num_rows else torch.tensor(rows, device=device),
        torch.tensor(mixes, device=device),
        torch.stack([gain for gain, _ in summed]),
        torch.stack([torch.zeros_like(g) if s is None else s for g, s in summed]) if some_shift else None,
    )


def _sum(
    parts_by_slot: Mapping[int, Sequence[Diagonal]], side: str, pairs: Pairs
) -> tuple[Tensor, Tensor | None]:
    weighted = [(w, p) for slot, w in pairs for p in parts_by_slot[slot] if p.side == side]
    extra_gain = torch.stack([weight * (part.gain - 1) for weight, part in weighted]).sum(0)
    shifts = [weight * part.shift for weight, part in weighted if part.shift is not None]
    return extra_gain, torch.stack(shifts).sum(0) if shifts else None


class _BoundDiagonal(Bound):
    def __init__(self, inputs: Sequence[_Gains | None], outputs: Sequence[_Gains | None]) -> None:
        self._inputs = inputs
        self._outputs = outputs

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        gains = self._inputs[member]
        return None if gains is None else gains.change(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        gains = self._outputs[member]
        return None if gains is None else gains.change(y_TO)
