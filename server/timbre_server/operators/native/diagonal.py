"""`Diagonal` in C++: a row's gain and shift are read where those of its mix lie.

Legend: T rows of the batch, N rows that have a gain, D features (in or out).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Change, Kernels, Uses
from timbre_server.operators.diagonal import BoundDiagonal, DiagonalOperator, Gains, gains_of
from timbre_server.operators.native.uses import KernelChange
from timbre_server.operators.row_table import RowTable


class NativeDiagonal(DiagonalOperator):
    """`DiagonalOperator` by ``diagonal.cpp``."""

    def bind(self, uses: Uses[Diagonal], table: RowTable) -> Bound:
        def kernels_of(side: str) -> list[_GainsKernel | None]:
            each = [gains_of(parts, side, table) for parts in uses]
            return [None if gains is None else _GainsKernel(gains, table) for gains in each]

        return _BoundGains(kernels_of("input"), kernels_of("output"))


class _RowGains(ctypes.Structure):
    """``Gains`` of ``diagonal.cpp``."""

    _fields_ = [("row", ctypes.c_int64), ("extra", ctypes.c_void_p), ("shift", ctypes.c_void_p)]


class _GainsKernel:
    """The gains at one side of one member: both its `GainChanges` and what they are added by, a `Kernel`."""

    def __init__(self, gains: Gains, table: RowTable) -> None:
        self._held = gains
        self.rows_N = torch.arange(table.num_rows) if gains.rows_N is None else gains.rows_N
        self.out_features = gains.extra_gain_MD.shape[1]
        pairs = zip(self.rows_N.tolist(), gains.mix_N.tolist(), strict=True)
        own = [
            _RowGains(row, _row_of(gains.extra_gain_MD, m), _row_of(gains.shift_MD, m)) for row, m in pairs
        ]
        self._rows = (_RowGains * len(own))(*own)
        self._begin = (ctypes.addressof(self._rows), len(own))
        self._work = len(own) * self.out_features
        self._run = kernel("timbre_diagonal", ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER)

    def change(self, v_TD: Tensor) -> Change:
        return KernelChange(self, v_TD.float().contiguous(), len(v_TD))

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        """``y_TO`` may be the source itself."""
        threads = num_threads(self._work)
        self._run(*self._begin, source.data_ptr(), y_TO.data_ptr(), self.out_features, threads)


class _BoundGains(BoundDiagonal):
    def __init__(self, inputs: Sequence[_GainsKernel | None], outputs: Sequence[_GainsKernel | None]) -> None:
        super().__init__(inputs, outputs)
        self._kernels = [
            Kernels(None if before is None else before.add, None if after is None else after.add)
            for before, after in zip(inputs, outputs, strict=True)
        ]

    def kernels(self, member: int) -> Kernels:
        return self._kernels[member]


def _row_of(values_MD: Tensor | None, row: int) -> int | None:
    """Its address."""
    return None if values_MD is None else values_MD.data_ptr() + row * values_MD.shape[1] * 4
