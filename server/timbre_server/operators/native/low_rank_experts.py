"""Experts of low rank in C++: each is read for those rows alone that a router sends to it.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks, K gates of one adapter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.operators.contract import Change, Uses
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.low_rank import BoundGated, Gating
from timbre_server.operators.native.bound_kernels import Sources
from timbre_server.operators.native.input_kernels import BoundInputKernels
from timbre_server.operators.native.prepared import Prepared, PreparedParts
from timbre_server.operators.native.structures import address_of, low_rank_fields, structures
from timbre_server.operators.row_table import RowTable

KERNEL = "timbre_low_rank_experts"
"""What adds `prepared_experts`."""


_SLACK = 64
"""What had room for so many times the rows was made for a prompt, and is given back."""


class AdapterGates:
    """Where the gates of one adapter's rows lie: ``Gates`` of ``gates.h``, which stays where it is."""

    def __init__(self, num_columns: int) -> None:
        self._fields = array("q", [0, num_columns, 0])
        self.address = address_of(self._fields)
        self.put(torch.empty(0, num_columns))

    def put(self, gates_NK: Tensor) -> None:
        """Contiguous ones."""
        self.gates_NK, self._num_rows = gates_NK, gates_NK.shape[0]
        self._fields[0] = gates_NK.data_ptr()

    def make_room(self, num_rows: int) -> None:
        """For so many rows, to be written there."""
        if not num_rows <= self._num_rows <= _SLACK * num_rows:
            self.put(torch.empty(num_rows, self._fields[1]))

    def count_at(self, acted: array[int]) -> None:
        """Let whoever writes gates count there, of each number of an expert, on how many rows any acted."""
        self._acted, self._fields[2] = acted, address_of(acted)


Experts = Sequence[tuple[LowRank, int]]
"""Each with the column of its gate; the ranks of one part have one gate."""


def prepared_experts(members: Sequence[Experts], gates: AdapterGates, share: float) -> PreparedParts:
    """Those of one adapter; ``share``: of its gates those that are not zero for one row, at most."""
    return PreparedParts([[_prepared(own, gates, share)] if own else [] for own in members])


def _prepared(experts: Experts, gates: AdapterGates, share: float) -> Prepared:
    """``AdapterExperts`` of ``low_rank.cpp``."""
    factors = [(part.a_RI.contiguous(), part.b_OR.T.contiguous()) for part, _ in experts]
    fields = [(*low_rank_fields(*own), column) for own, (_, column) in zip(factors, experts, strict=True)]
    own_experts = structures(fields)
    shape = factors[0][1].shape[1], factors[0][0].shape[1]
    work = int(share * sum(shape) * sum(len(a_RI) for a_RI, _ in factors))
    held = factors, own_experts, gates
    return Prepared((address_of(own_experts), len(experts), gates.address), shape, work, held)


class BoundExperts(BoundGated):
    """All experts of low rank at a group, with gates from wherever they come."""

    def __init__(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> None:
        rows = LiveRows()
        self.kernels = BoundInputKernels(KERNEL, rows, Sources(), reads_bfloat16=True)
        self._gates: dict[int, AdapterGates] = {}
        for slot in table.slots:
            each = [parts_by_slot.get(slot, ()) for parts_by_slot in uses]
            if any(each):
                num_columns = gating.num_columns[slot]
                gates = self._gates[slot] = AdapterGates(num_columns)
                members = _with_columns(each, gating.columns[slot])
                share = gating.num_kept[slot] / num_columns
                self.kernels.admit(slot, prepared_experts(members, gates, share))
        self.kernels.bound(table)

    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        for slot, own in self._gates.items():
            own.put(gates(slot).contiguous())
        return self.kernels.sums(x_TI)


def _with_columns(members: Sequence[Sequence[LowRank]], columns: Sequence[int]) -> list[Experts]:
    """``columns``: as `Gating.columns`, of one adapter."""
    ranks = [part.a_RI.shape[0] for own in members for part in own]
    firsts = accumulate(ranks, initial=0)
    return [
        [(part, columns[first]) for part, first in zip(own, firsts, strict=False) if part.a_RI.shape[0]]
        for own in members
    ]
