"""`Diagonal` in C++: a row's gain and shift are read where those of its mix lie.

Legend: T rows of the batch, N rows that have a gain, D features (in or out).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Adds, Bound, Change, Uses
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


class _GainsKernel:
    """The gains at one side of one member: both its `GainChanges` and what they are added by, a `Kernel`."""

    def __init__(self, gains: Gains, table: RowTable) -> None:
        self._held = gains
        self.rows_N = torch.arange(table.num_rows) if gains.rows_N is None else gains.rows_N
        self.out_features = gains.extra_gain_MD.shape[1]
        extra_N, shift_N = (
            _addresses(values, gains.mix_N) for values in (gains.extra_gain_MD, gains.shift_MD)
        )
        self._rows_N3 = torch.stack([self.rows_N, extra_N, shift_N], 1)
        """``Gains`` of ``diagonal.cpp``."""
        self._begin = self._rows_N3.data_ptr(), len(self._rows_N3)
        self._work = self._rows_N3.shape[0] * self.out_features
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
        self._adds = [
            Adds(None if before is None else before.add, None if after is None else after.add)
            for before, after in zip(inputs, outputs, strict=True)
        ]

    def adds(self, member: int) -> Adds:
        return self._adds[member]


def _addresses(values_MD: Tensor | None, rows_N: Tensor) -> Tensor:
    """Of these rows; zeros where there are none."""
    if values_MD is None:
        return torch.zeros_like(rows_N)
    return rows_N * (values_MD.shape[1] * values_MD.itemsize) + values_MD.data_ptr()
