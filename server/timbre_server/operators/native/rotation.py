"""`Rotation` in C++: an adapter's blocks are read where they lie, once for all of its rows.

What takes a base product of its own, the rows of rotations with a scale, the plain operator prepares.

Legend: F factors, S stored blocks, B their size, I in.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from torch import Tensor

from timbre_methods.program import Rotation
from timbre_server.operators.contract import (
    Bound,
    Change,
    Members,
    OwnProduct,
    Standing,
    StandingOperator,
    uses_of,
)
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.sides import PreparedSides, StandingSides, prepared_sides
from timbre_server.operators.native.uses import Prepared, address_of
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.row_table import RowTable


@dataclass(frozen=True, slots=True, eq=False)
class _Rotations:
    """Of one adapter."""

    sides: PreparedSides
    scaled: Members[Rotation]
    """Those with a scale alone."""


class NativeRotation(StandingOperator[Rotation, _Rotations], RotationOperator):
    """`RotationOperator` by ``rotation.cpp``."""

    def prepared(self, members: Members[Rotation]) -> _Rotations:
        scaled = [[part for part in own if part.scale_O is not None] for own in members]
        return _Rotations(prepared_sides(members, _prepared), scaled)

    def standing(self, rows: LiveRows) -> Standing[_Rotations]:
        return _StandingRotations(rows)


def _prepared(part: Rotation) -> Prepared:
    """As ``Rotation`` of ``rotation.cpp``."""
    blocks_FSBB, chunks = part.blocks_FSBB.contiguous(), array("q", part.chunks)
    factors, stored, size, _ = blocks_FSBB.shape
    fields = blocks_FSBB.data_ptr(), address_of(chunks), factors, stored, size
    features = stored * size
    return Prepared(fields, (features, features), blocks_FSBB.numel(), (blocks_FSBB, chunks))


class _StandingRotations(Standing[_Rotations]):
    def __init__(self, rows: LiveRows) -> None:
        self._sides = StandingSides("timbre_rotation", rows)
        self._scaled: dict[int, Members[Rotation]] = {}
        """By slot."""
        self._plain = RotationOperator()

    def admit(self, slot: int, prepared: _Rotations) -> None:
        self._sides.admit(slot, prepared.sides)
        if any(prepared.scaled):
            self._scaled[slot] = prepared.scaled

    def dismiss(self, slot: int) -> None:
        self._sides.dismiss(slot)
        self._scaled.pop(slot, None)

    def bound(self, table: RowTable) -> Bound:
        turned = self._sides.bound(table)
        scaled = {slot: self._scaled[slot] for slot in table.slots if slot in self._scaled}
        return _Scaled(turned, self._plain.bind(uses_of(scaled), table)) if scaled else turned


class _Scaled(Bound):
    """Rotations of which some have a scale."""

    def __init__(self, turned: Bound, scaled: Bound) -> None:
        self._turned, self._scaled = turned, scaled

    @property
    def reads_input_alone(self) -> bool:
        return False

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        return self._turned.input_change(member, x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        return self._turned.output_change(member, y_TO)

    def own_product(self, member: int, x_TI: Tensor) -> OwnProduct | None:
        return self._scaled.own_product(member, x_TI)
