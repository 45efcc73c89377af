"""`Sparse` in C++: every adapter's matrix is read where it lies, once for each eight rows.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.program import Sparse
from timbre_server.native.library import library, num_threads
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.native.uses import KernelChange, Rows, rows_of
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.sparse import SparseOperator


class NativeSparse(SparseOperator):
    """`SparseOperator` by ``sparse.cpp``."""

    def bind(self, uses: Uses[Sparse], table: RowTable) -> Bound:
        return _BoundSparse([_member(parts_by_slot, table) for parts_by_slot in uses])


class _Use(ctypes.Structure):
    _fields_ = [
        ("row_ends", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", Rows),
    ]


def _member(parts_by_slot: Mapping[int, Sequence[Sparse]], table: RowTable) -> _Member | None:
    found = [
        (segment, _laid_out(part))
        for segment in table.segments
        for part in parts_by_slot.get(segment.slot, ())
    ]
    return _Member(found) if found else None


def _laid_out(part: Sparse) -> Sparse:
    """As the kernel reads it; most often it is."""
    return Sparse(
        part.row_ends.to(torch.int64).contiguous(),
        part.columns_N.to(torch.int32).contiguous(),
        part.values_N.contiguous(),
        part.in_features,
    )


class _Member:
    """The `Kernel` of one member of a group."""

    def __init__(self, uses: Sequence[tuple[Segment, Sparse]]) -> None:
        self._held = tuple(uses)
        first = uses[0][1]
        self.out_features, self._in_features = len(first.row_ends) - 1, first.in_features
        self._uses = (_Use * len(uses))(
            *(
                _Use(
                    part.row_ends.data_ptr(),
                    part.columns_N.data_ptr(),
                    part.values_N.data_ptr(),
                    Rows.of(segment),
                )
                for segment, part in uses
            )
        )
        self._work = sum(len(segment.rows_N) * len(part.values_N) for segment, part in uses)
        self._run = library().timbre_sparse

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of([segment for segment, _ in self._held])

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        self._run(
            self._uses,
            ctypes.c_int64(len(self._uses)),
            ctypes.c_void_p(source.data_ptr()),
            ctypes.c_int64(self._in_features),
            ctypes.c_void_p(y_TO.data_ptr()),
            ctypes.c_int64(self.out_features),
            num_threads(self._work),
        )


class _BoundSparse(Bound):
    def __init__(self, members: Sequence[_Member | None]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        return [
            () if member is None else (KernelChange(member, x_TI, len(x_TI)),) for member in self._members
        ]
