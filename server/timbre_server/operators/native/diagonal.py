"""`Diagonal` in C++: gains and shifts are read where an adapter's lie.

Legend: T rows of the batch, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_server.native.library import ADDRESS, NUMBER, kernel
from timbre_server.operators.contract import Adds, Bound, Change, Members, Standing, StandingOperator
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.uses import KernelChange, Prepared, PreparedParts, Uses
from timbre_server.operators.row_table import RowTable

_Side = Literal["input", "output"]
_Place = tuple[int, _Side]
"""A member of a group, and a side of it."""


class NativeDiagonal(StandingOperator[Diagonal, dict[_Side, PreparedParts]], DiagonalOperator):
    """`DiagonalOperator` by ``diagonal.cpp``."""

    def prepared(self, members: Members[Diagonal]) -> dict[_Side, PreparedParts]:
        return {
            side: PreparedParts([[_prepared(part) for part in own if part.side == side] for own in members])
            for side in {part.side for own in members for part in own}
        }

    def standing(self, rows: LiveRows) -> Standing[dict[_Side, PreparedParts]]:
        return _StandingGains(rows)


def _prepared(part: Diagonal) -> Prepared:
    """As ``Gains`` of ``diagonal.cpp``."""
    extra_gain_D = part.gain - 1
    shift_D = None if part.shift is None else part.shift.contiguous()
    fields = extra_gain_D.data_ptr(), 0 if shift_D is None else shift_D.data_ptr()
    size = extra_gain_D.shape[0]
    return Prepared(fields, (size, size), size, (extra_gain_D, shift_D))


class _GainsKernel:
    """The gains at one side of one member: what their changes are added by, a `Kernel`."""

    def __init__(self, features: int, rows: LiveRows) -> None:
        self.out_features = features
        self.uses = Uses(rows)
        self._run = kernel("timbre_diagonal", ADDRESS, ADDRESS, ADDRESS, NUMBER, NUMBER)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.uses.rows_N

    def change(self, v_TD: Tensor) -> Change:
        return KernelChange(self, v_TD.float().contiguous(), len(v_TD))

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        """``y_TO`` may be the source itself."""
        addresses, features = (self.uses.address, source.data_ptr(), y_TO.data_ptr()), self.out_features
        self._run(*addresses, source.numel() // features, features, torch.get_num_threads())


class _StandingGains(Standing[dict[_Side, PreparedParts]]):
    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows
        self._kernels: dict[_Place, _GainsKernel] = {}
        self._places: dict[int, frozenset[_Place]] = {}
        """By slot."""
        self._bounds: dict[frozenset[_Place], _BoundGains] = {}

    def admit(self, slot: int, prepared: dict[_Side, PreparedParts]) -> None:
        parts = {
            (member, side): own for side, each in prepared.items() for member, own in each.members.items()
        }
        self._places[slot] = frozenset(parts)
        for place, own in parts.items():
            if place not in self._kernels:
                self._kernels[place] = _GainsKernel(own.shape[0], self._rows)
            self._kernels[place].uses.admit(slot, own)

    def dismiss(self, slot: int) -> None:
        for place in self._places.pop(slot):
            self._kernels[place].uses.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        """Of those places alone that the table's adapters change."""
        self._rows.show(table)
        # A change of the input takes longer, and makes that of the output do so.
        places = frozenset[_Place]().union(*(self._places.get(slot, ()) for slot in table.slots))
        if places not in self._bounds:
            self._bounds[places] = _BoundGains({place: self._kernels[place] for place in places})
        return self._bounds[places]


class _BoundGains(Bound):
    def __init__(self, kernels: Mapping[_Place, _GainsKernel]) -> None:
        self._kernels = kernels

    @property
    def reads_input_alone(self) -> bool:
        return False

    @property
    def outlasts_tables(self) -> bool:
        return True

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        own = self._kernels.get((member, "input"))
        return None if own is None else own.change(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        own = self._kernels.get((member, "output"))
        return None if own is None else own.change(y_TO)

    def adds(self, member: int) -> Adds:
        before, after = self._kernels.get((member, "input")), self._kernels.get((member, "output"))
        return Adds(None if before is None else before.add, None if after is None else after.add)

    def source(self, x_TI: Tensor) -> Tensor:
        """Of sums, which there are none of."""
        return x_TI
