"""`Diagonal` in Triton: ``change = Σ w (gain - 1) ∘ v + Σ w · shift``, v the input or the base's output.

A program has one row and 1024 of its features: it reads v once, and the gains and shifts of each of the
row's adapters where they lie. Rows of any mixes run in one launch. No atomics are used, and a value is
written once.

Checked under Triton's interpreter and on an H200.

Legend: T rows of the batch, Q rows that have a gain, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.diagonal import BoundDiagonal, DiagonalOperator
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton.crowds import CrowdRows, Outputs, crowds_of
from timbre_server.operators.triton.launch import numbers

WIDTH = 1024

GAIN = tl.constexpr(2)
"""Addresses of a part: gain, and shift or 0."""


@triton.jit(do_not_specialize=["num_rows_Q"])
def apply_gains(
    v: tl.tensor,
    features: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    num_rows_Q: tl.tensor,
    runs: tl.tensor,
    gains: tl.tensor,
    pairs: tl.tensor,
    places: tl.tensor,
    change: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    q, d = tl.program_id(0), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_feature = d < features
    first, count = tl.load(runs + q * 2), tl.load(runs + q * 2 + 1)
    extra_gain_D = tl.zeros((WIDTH,), tl.float32)
    shift_D = tl.zeros((WIDTH,), tl.float32)
    for p in range(first, first + count):
        weight = tl.load(weights + tl.load(pairs + p) * num_rows_Q + q)
        gain = tl.load(gains + p * GAIN).to(tl.pointer_type(tl.float32))
        extra_gain_D += weight * (tl.load(gain + d, mask=is_feature, other=1.0) - 1.0)
        shift_address = tl.load(gains + p * GAIN + 1)
        shift = shift_address.to(tl.pointer_type(tl.float32))
        shift_D += weight * tl.load(shift + d, mask=is_feature & (shift_address != 0), other=0.0)
    v_D = tl.load(v + tl.load(rows + q).to(tl.int64) * features + d, mask=is_feature, other=0.0)
    out = change + tl.load(places + q).to(tl.int64) * features + d
    tl.store(out, extra_gain_D * v_D.to(tl.float32) + shift_D, mask=is_feature)


class TritonDiagonal(DiagonalOperator):
    def bind(self, uses: Uses[Diagonal], table: RowTable) -> Bound:
        return BoundDiagonal(
            [_Gains.of(parts, "input", table) for parts in uses],
            [_Gains.of(parts, "output", table) for parts in uses],
        )


class _Gains:
    """One side of one member. Keeps the parts whose addresses it holds."""

    def __init__(self, parts_by_slot: Mapping[int, Sequence[Diagonal]], table: RowTable) -> None:
        crowds = crowds_of(table, parts_by_slot)
        self._parts = parts_by_slot
        self._rows = CrowdRows(crowds, table.device)
        width = next(len(part.gain) for own in parts_by_slot.values() for part in own)
        self._outputs = Outputs(table, [parts_by_slot], [width])
        self._places_1Q = self._outputs.places(crowds)
        runs: list[tuple[int, int]] = []
        gains: list[tuple[int, int]] = []
        pairs: list[int] = []
        for crowd in crowds:
            first = len(pairs)
            for pair, slot in enumerate(crowd.slots):
                for part in parts_by_slot[slot]:
                    gains.append((part.gain.data_ptr(), 0 if part.shift is None else part.shift.data_ptr()))
                    pairs.append(pair)
            runs.append((first, len(pairs) - first))
        num_rows = torch.tensor([crowd.num_rows for crowd in crowds])
        self._runs_Q2 = torch.tensor(runs, dtype=torch.int32).repeat_interleave(num_rows, 0).to(table.device)
        self._pairs = numbers(pairs, table.device)
        self._gains = torch.tensor(gains, dtype=torch.int64, device=table.device)

    @staticmethod
    def of(parts_by_slot: Mapping[int, Sequence[Diagonal]], side: str, table: RowTable) -> _Gains | None:
        own = {
            slot: [_contiguous(part) for part in parts_by_slot.get(slot, ()) if part.side == side]
            for slot in table.slots
        }
        present = {slot: parts for slot, parts in own.items() if parts}
        return _Gains(present, table) if present else None

    def change(self, v_TD: Tensor) -> Change:
        v_TD = v_TD.contiguous()
        change = self._outputs.empty()
        apply_gains[self._rows.num_rows, triton.cdiv(v_TD.shape[1], WIDTH)](
            v_TD, v_TD.shape[1], self._rows.rows_Q, self._rows.weights_KQ, self._rows.num_rows,
            self._runs_Q2, self._gains, self._pairs, self._places_1Q, change, WIDTH=WIDTH,
        )  # fmt: skip
        [[found]] = self._outputs.changes(change)
        return found


def _contiguous(part: Diagonal) -> Diagonal:
    shift = None if part.shift is None else part.shift.contiguous()
    return Diagonal(part.side, part.gain.contiguous(), shift)
