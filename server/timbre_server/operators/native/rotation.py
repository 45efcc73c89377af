"""`Rotation` in C++: an adapter's blocks are read where they lie, once for all of its rows.

A scale is a gain on the base product of the changed input, for a row whose input is changed by that rotation
alone, with a weight of 1. Other rows, as mixes are, take products of their own, which the plain operator
prepares.

Legend: F factors, S stored blocks, B their size, I in.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, replace

from torch import Tensor

from timbre_methods.program import Diagonal, Rotation
from timbre_server.native.formats import format_of
from timbre_server.operators.contract import (
    Adds,
    Bound,
    Change,
    Members,
    OwnProduct,
    Standing,
    StandingOperator,
    uses_of,
)
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.diagonal import prepared_gains
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.native.sides import PreparedSides, StandingSides, prepared_sides
from timbre_server.operators.native.structures import address_of
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.row_table import RowTable, Span


@dataclass(frozen=True, slots=True, eq=False)
class _Rotations:
    """Of one adapter."""

    sides: PreparedSides
    scaled: Members[Rotation]
    """Those with a scale alone."""
    scales: PreparedSides
    """As gains on an output."""
    is_alone: bool
    """Whether each of those is the only one that changes its layer's input."""


class NativeRotation(StandingOperator[Rotation, _Rotations], RotationOperator):
    """`RotationOperator` by ``rotation.cpp``."""

    def prepared(self, members: Members[Rotation]) -> _Rotations:
        scaled = [[part for part in own if part.scale_O is not None] for own in members]
        gains = [
            [Diagonal("output", part.scale_O) for part in own if part.scale_O is not None] for own in members
        ]
        num_inputs = [sum(part.side == "input" for part in own) for own in members]
        is_alone = all(count == 1 for count, own in zip(num_inputs, scaled, strict=True) if own)
        sides = prepared_sides(members, _prepared)
        return _Rotations(sides, scaled, prepared_sides(gains, prepared_gains), is_alone)

    def standing(self, rows: LiveRows) -> Standing[_Rotations]:
        return _StandingRotations(rows)


def _prepared(part: Rotation) -> Prepared:
    """As ``Rotation`` of ``rotation.cpp``."""
    blocks_FSBB, chunks = part.blocks_FSBB.contiguous(), array("q", part.chunks)
    factors, stored, size, _ = blocks_FSBB.shape
    lies = blocks_FSBB.data_ptr(), format_of(blocks_FSBB)
    fields = *lies, address_of(chunks), factors, stored, size
    features = stored * size
    return Prepared(fields, (features, features), blocks_FSBB.numel(), (blocks_FSBB, chunks))


class _StandingRotations(Standing[_Rotations]):
    def __init__(self, rows: LiveRows) -> None:
        self._sides = StandingSides("timbre_rotation", rows)
        self._scales = StandingSides("timbre_diagonal", rows)
        self._scaled: dict[int, _Rotations] = {}
        """By slot: those with scales."""
        self._plain = RotationOperator()

    def admit(self, slot: int, prepared: _Rotations) -> None:
        self._sides.admit(slot, prepared.sides)
        if prepared.scales:
            self._scaled[slot] = prepared
            self._scales.admit(slot, prepared.scales)

    def dismiss(self, slot: int) -> None:
        self._sides.dismiss(slot)
        if self._scaled.pop(slot, None):
            self._scales.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        turned = self._sides.bound(table)
        if not any(slot in self._scaled for slot in table.slots):
            return turned
        apart = [span for span in table.spans if table.is_gated or not self._is_gained(span)]
        if not apart:
            return _Scaled(turned, self._scales.bound(table))
        return self._with_products(turned, table, frozenset(apart))

    def _is_gained(self, span: Span) -> bool:
        """Whether gains are all that its rows take, if anything."""
        scaled = [pair for pair in span.pairs if pair[0] in self._scaled]
        if not scaled:
            return True
        slot, weight = scaled[0]
        return len(span.pairs) == 1 and weight == 1 and self._scaled[slot].is_alone

    def _with_products(self, turned: Bound, table: RowTable, apart: Collection[Span]) -> Bound:
        """For those spans."""
        gained = _without(table, apart)
        others = table if table.is_gated else _without(table, set(table.spans).difference(apart))
        scales = StandingSides("timbre_diagonal", LiveRows())
        for slot in self._scaled.keys() & gained.slots:
            scales.admit(slot, self._scaled[slot].scales)
        scaled = {slot: self._scaled[slot].scaled for slot in others.slots if slot in self._scaled}
        return _Scaled(turned, scales.bound(gained), self._plain.bind(uses_of(scaled), others))


def _without(table: RowTable, spans: Collection[Span]) -> RowTable:
    """Of as many rows, but base rows in place of some."""
    return RowTable([Span(span.num_rows) if span in spans else span for span in table.spans], table.device)


@dataclass(frozen=True, slots=True)
class _Scaled(Bound):
    """Rotations of which some have a scale."""

    turned: Bound
    scales: Bound
    products: Bound | None = None

    @property
    def reads_input_alone(self) -> bool:
        return False

    @property
    def outlasts_tables(self) -> bool:
        return self.products is None

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        return self.turned.input_change(member, x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        return self.turned.output_change(member, y_TO)

    def product_change(self, member: int, y_TO: Tensor) -> Change | None:
        return self.scales.output_change(member, y_TO)

    def own_product(self, member: int, x_TI: Tensor) -> OwnProduct | None:
        return None if self.products is None else self.products.own_product(member, x_TI)

    def adds(self, member: int) -> Adds | None:
        turned, scales = self.turned.adds(member), self.scales.adds(member)
        if self.products is not None or turned is None or scales is None:
            return None
        return replace(turned, product_change=scales.output_change)

    def source(self, x_TI: Tensor) -> Tensor:
        """Of sums, which there are none of."""
        return x_TI
