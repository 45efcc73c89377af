"""What operators in C++ have in common that change a member's input, or its base's output.

Legend: T rows of the batch, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

import torch
from torch import Tensor

from timbre_methods.program import Diagonal, Rotation
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel
from timbre_server.operators.contract import Adds, Bound, Change, Members, SideAdd, Standing
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import KernelChange
from timbre_server.operators.native.prepared import MemberParts, Prepared, PreparedParts
from timbre_server.operators.native.uses import Uses
from timbre_server.operators.row_table import RowTable

PartT = TypeVar("PartT", Diagonal, Rotation)

_Place = tuple[int, Literal["input", "output"]]
"""A member of a group, and a side of it."""

_NOWHERE = frozenset[_Place]()

PreparedSides = Mapping[_Place, MemberParts]
"""An adapter's parts at each place that it changes."""


def prepared_sides(members: Members[PartT], prepared: Callable[[PartT], Prepared]) -> PreparedSides:
    found: dict[_Place, MemberParts] = {}
    for side in {part.side for own in members for part in own}:
        parts = PreparedParts([[prepared(part) for part in own if part.side == side] for own in members])
        found |= {(member, side): own for member, own in parts.members.items()}
    return found


class _SideKernel:
    """All parts at one place: what their changes are added by, a `Kernel`."""

    def __init__(self, name: str, rows: LiveRows) -> None:
        self.uses = Uses(rows)
        self.out_features = 0
        """Of what it was last asked for a change of: parts do not always tell."""
        self._run = kernel(name, ADDRESS, ADDRESS, ADDRESS, ROWS, NUMBER)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.uses.rows_N

    def change(self, v_TD: Tensor) -> Change:
        self.out_features = v_TD.shape[1]
        return KernelChange(self, v_TD.float().contiguous(), len(v_TD))

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        """``y_TO`` may be the source itself."""
        addresses, features = (self.uses.address, source.data_ptr(), y_TO.data_ptr()), source.shape[-1]
        self._run(*addresses, source.numel() // features, features, torch.get_num_threads())


class StandingSides(Standing[PreparedSides]):
    """By the kernel ``name(uses, x, y, T, D, threads)``, which may be given one tensor as both."""

    def __init__(self, name: str, rows: LiveRows) -> None:
        self._name, self._rows = name, rows
        self._kernels: dict[_Place, _SideKernel] = {}
        self._places: dict[int, frozenset[_Place]] = {}
        """By slot."""
        self._bounds: dict[frozenset[_Place], _BoundSides] = {}

    def admit(self, slot: int, prepared: PreparedSides) -> None:
        self._places[slot] = frozenset(prepared)
        for place, own in prepared.items():
            if place not in self._kernels:
                self._kernels[place] = _SideKernel(self._name, self._rows)
            self._kernels[place].uses.admit(slot, own)

    def dismiss(self, slot: int) -> None:
        for place in self._places.pop(slot):
            self._kernels[place].uses.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        """Of those places alone that the table's adapters change."""
        self._rows.show(table)
        # A change of the input takes longer, and makes that of the output do so.
        places = _NOWHERE.union(*{self._places.get(slot, _NOWHERE) for slot in table.slots})
        if places not in self._bounds:
            self._bounds[places] = _BoundSides({place: self._kernels[place] for place in places})
        return self._bounds[places]


class _BoundSides(Bound):
    def __init__(self, kernels: Mapping[_Place, _SideKernel]) -> None:
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
        return Adds(self._add((member, "input")), self._add((member, "output")))

    def _add(self, place: _Place) -> SideAdd | None:
        own = self._kernels.get(place)
        return None if own is None else SideAdd(own.add, own.uses.slots)

    def source(self, x_TI: Tensor) -> Tensor:
        """Of sums, which there are none of."""
        return x_TI
