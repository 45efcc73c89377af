"""`Projected` in C++, of diagonal cores: every matrix of a basis is read once for sixteen uses.

Where all blocks of P read the same input they are one matrix, as are all blocks of Q that add to the same
output; blocks with vectors of their own between are as many uses of the one block that they have in common.
Dense and sparse cores, and matrices that are laid out in another way, run in the plain operator.

Legend: T rows of the batch, N blocks, I in, O out, P and Q sizes of the basis.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timbre_methods.program import Projected
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import rows_fields
from timbre_server.operators.native.uses import (
    BoundKernels,
    Fields,
    address_of,
    rows_of,
    structures,
)
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.row_table import RowTable, Segment


class NativeProjected(ProjectedOperator):
    """`ProjectedOperator` by ``projected.cpp``."""

    def bind(self, uses: Uses[Projected], table: RowTable) -> Bound:
        served: list[dict[int, list[Projected]]] = [{} for _ in uses]
        others: list[dict[int, list[Projected]]] = [{} for _ in uses]
        for member, parts_by_slot in enumerate(uses):
            for slot in table.slots:
                for part in parts_by_slot.get(slot, ()):
                    (served if _is_served(part) else others)[member].setdefault(slot, []).append(part)
        bound = _BoundProjected(served, table)
        return JoinedSums([bound, super().bind(others, table)]) if any(others) else bound


def _is_served(part: Projected) -> bool:
    if part.form != "diagonal":
        return False
    num_blocks, p_NPI, q_NOQ = part.core.shape[0], part.basis.p_NPI, part.basis.q_NOQ
    blocks = 1 if part.inner_NI is not None else num_blocks, 1 if part.outer_NO is not None else num_blocks
    return blocks == (p_NPI.shape[0], q_NOQ.shape[0]) and _p_lies(p_NPI) and _q_lies(q_NOQ)


def _p_lies(p_NPI: Tensor) -> bool:
    """Whether all rows of all blocks follow one another, each of consecutive numbers."""
    return p_NPI.stride(2) == 1 and (
        p_NPI.shape[0] == 1 or p_NPI.stride(0) == p_NPI.shape[1] * p_NPI.stride(1)
    )


def _q_lies(q_NOQ: Tensor) -> bool:
    """Whether each row of all blocks is of consecutive numbers, block after block."""
    return q_NOQ.stride(2) == 1 and (q_NOQ.shape[0] == 1 or q_NOQ.stride(0) == q_NOQ.shape[2])


class _Matrix(ctypes.Structure):
    """``SharedMatrix`` of ``projected.cpp``."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    ]

    @staticmethod
    def of_p(p_NPI: Tensor) -> _Matrix:
        num_blocks, size, in_features = p_NPI.shape
        return _Matrix(p_NPI.data_ptr(), num_blocks * size, in_features, p_NPI.stride(1))

    @staticmethod
    def of_q(q_NOQ: Tensor) -> _Matrix:
        num_blocks, out_features, size = q_NOQ.shape
        return _Matrix(q_NOQ.data_ptr(), out_features, num_blocks * size, q_NOQ.stride(1))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where z has what one part reads after P: from ``start`` on, rows of ``width`` numbers, of the batch
    or of one adapter alone."""

    start: int
    width: int
    has_own: bool

    def use(self, rows: Fields, before: int, after: int, first: int = 0) -> Fields:
        """``ProjectedUse`` of ``projected.cpp``, of what lies there from a number of each row on; vectors by
        their addresses, 0 for none."""
        return *rows, before, after, self.start + first, self.width, self.has_own


class _Product:
    """Some uses of one matrix."""

    def __init__(self, name: str, shared: Tensor, matrix: _Matrix) -> None:
        """By the function of that name; ``shared`` is what ``matrix`` has the address of."""
        self._run = kernel(name, ADDRESS, ADDRESS, NUMBER, ADDRESS, ADDRESS)
        self._matrix = matrix
        self._held: list[object] = [shared]
        self._uses: list[Fields] = []

    def add(self, use: Fields, *held: object) -> None:
        """``held``: what ``use`` has the addresses of."""
        self._uses.append(use)
        self._held += held

    @cached_property
    def _array(self) -> array[int]:
        return structures(self._uses)

    @cached_property
    def _work(self) -> int:
        num_products = sum(count for _, _, count, *_ in self._uses)
        return num_products * int(self._matrix.rows) * int(self._matrix.columns)

    def __call__(self, source: Tensor, target: Tensor) -> None:
        self._run(
            ctypes.addressof(self._matrix),
            address_of(self._array),
            len(self._uses),
            source.data_ptr(),
            target.data_ptr(),
            num_threads(self._work),
        )


class _BoundProjected(BoundKernels):
    def __init__(self, uses: Uses[Projected], table: RowTable) -> None:
        self._table, self._size = table, 0
        self._shrinks: dict[int, _Product] = {}
        """By the identity of their P."""
        self._shared = self._shared_places(uses)
        super().__init__([self._member(own) if own else None for own in uses])

    def _shared_places(self, uses: Uses[Projected]) -> Mapping[int, _Place]:
        """Of each P that is multiplied by x itself, for all of its rows at once."""
        slots: dict[int, set[int]] = {}
        matrices: dict[int, Tensor] = {}
        for parts_by_slot in uses:
            for slot, parts in parts_by_slot.items():
                for p_NPI in (part.basis.p_NPI for part in parts if part.inner_NI is None):
                    matrices[id(p_NPI)] = p_NPI
                    slots.setdefault(id(p_NPI), set()).add(slot)
        places = {}
        for key, p_NPI in matrices.items():
            found = self._table.rows_using(slots[key])
            rows_N = torch.arange(self._table.num_rows) if found is None else found
            places[key] = self._place(self._table.num_rows, len(p_NPI) * p_NPI.shape[1], has_own=False)
            self._shrink(p_NPI).add(places[key].use(_unweighted(rows_N), 0, 0), rows_N)
        return places

    def _place(self, num_rows: int, width: int, *, has_own: bool) -> _Place:
        start = self._size
        self._size += num_rows * width
        return _Place(start, width, has_own)

    def _shrink(self, p_NPI: Tensor) -> _Product:
        if id(p_NPI) not in self._shrinks:
            self._shrinks[id(p_NPI)] = _Product("timbre_projected_in", p_NPI, _Matrix.of_p(p_NPI))
        return self._shrinks[id(p_NPI)]

    def _place_of(self, part: Projected, segment: Segment) -> _Place:
        """Where P's blocks have what this part reads; where it has inner vectors, it alone."""
        if part.inner_NI is None:
            return self._shared[id(part.basis.p_NPI)]
        num_blocks, size = part.core.shape
        place = self._place(len(segment.rows_N), num_blocks * size, has_own=True)
        rows, inner_NI = _unweighted(segment.rows_N), part.inner_NI.contiguous()
        for number, inner in enumerate(_addresses(inner_NI)):
            self._shrink(part.basis.p_NPI).add(place.use(rows, inner, 0, number * size), segment, inner_NI)
        return place

    def _member(self, parts_by_slot: Mapping[int, Sequence[Projected]]) -> _Member:
        expands: dict[int, _Product] = {}
        segments = [segment for segment in self._table.segments if segment.slot in parts_by_slot]
        for segment in segments:
            rows = rows_fields(segment)
            for part in parts_by_slot[segment.slot]:
                place, core_NP = self._place_of(part, segment), part.core.contiguous()
                q_NOQ = part.basis.q_NOQ
                if id(q_NOQ) not in expands:
                    expands[id(q_NOQ)] = _Product("timbre_projected_out", q_NOQ, _Matrix.of_q(q_NOQ))
                expand = expands[id(q_NOQ)]
                if part.outer_NO is None:
                    expand.add(place.use(rows, core_NP.data_ptr(), 0), segment, core_NP)
                    continue
                outer_NO, size = part.outer_NO.contiguous(), core_NP.shape[1]
                vectors = zip(_addresses(core_NP), _addresses(outer_NO), strict=True)
                for number, (core, outer) in enumerate(vectors):
                    use = place.use(rows, core, outer, number * size)
                    expand.add(use, segment, core_NP, outer_NO)
        first = next(part for parts in parts_by_slot.values() for part in parts)
        return _Member(segments, tuple(expands.values()), first.basis.q_NOQ.shape[1])

    def source(self, x_TI: Tensor) -> Tensor:
        x_TI, z = x_TI.float(), torch.zeros(self._size)
        for shrink in self._shrinks.values():
            shrink(x_TI, z)
        return z


def _addresses(vectors_ND: Tensor) -> list[int]:
    """Of contiguous rows."""
    first, (count, size) = vectors_ND.data_ptr(), vectors_ND.shape
    return [first + number * size * vectors_ND.itemsize for number in range(count)]


def _unweighted(rows_N: Tensor) -> Fields:
    return rows_N.data_ptr(), 0, rows_N.shape[0]


class _Member:
    """The `Kernel` of one member, whose source is z."""

    def __init__(self, segments: Sequence[Segment], expands: Sequence[_Product], out_features: int) -> None:
        self._segments, self._expands, self.out_features = segments, expands, out_features

    @cached_property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of(self._segments)

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        for expand in self._expands:
            expand(source, y_TO)
