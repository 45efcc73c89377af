"""`Block` and dense changes in C++: every adapter's matrix is read where it lies, once for a few rows.

Legend: O out, I in, N channels of a block.
"""

from __future__ import annotations

from torch import Tensor

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import Block, Dense
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.contract import Members, Standing, StandingOperator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.uses import BoundInputKernels, Prepared, PreparedParts, Sources
from timbre_server.operators.packed_dense import PackedDenseOperator


class NativeBlock(StandingOperator[Block, PreparedParts], BlockOperator):
    """`BlockOperator` by ``block.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[Block]) -> PreparedParts:
        return PreparedParts([[_block(part) for part in own if part.block.numel()] for own in members])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundInputKernels("timbre_block", rows, self._sources)


class NativeDense(StandingOperator[Dense, PreparedParts], DenseOperator):
    """`DenseOperator` by ``block.cpp``, too."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[Dense]) -> PreparedParts:
        return PreparedParts([[_prepared(part.delta_OI, None, None) for part in own] for own in members])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundInputKernels("timbre_block", rows, self._sources)


class NativePackedDense(StandingOperator[PackedDense, PreparedParts], PackedDenseOperator):
    """`PackedDenseOperator` by ``packed_dense.cpp``, of rows that are rounded to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[PackedDense]) -> PreparedParts:
        return PreparedParts([[_packed(part) for part in own] for own in members])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundInputKernels("timbre_packed_dense", rows, self._sources)


def _packed(part: PackedDense) -> Prepared:
    """As ``Matrix`` of ``matrices.h``."""
    num_out, num_in = part.shape
    return Prepared((part.panels.data_ptr(), num_out, num_in, 0), part.shape, num_out * num_in, part)


def _block(part: Block) -> Prepared:
    is_input = part.side == "input"
    index_N = part.index_N.contiguous()
    to, of = (None, index_N) if is_input else (index_N, None)
    return _prepared(part.block, to, of, part.out_features)


def _prepared(
    matrix: Tensor, to: Tensor | None, of: Tensor | None, out_features: int | None = None
) -> Prepared:
    """As ``Block`` of ``block.cpp``."""
    matrix = matrix.contiguous()
    places = (0 if index is None else index.data_ptr() for index in (to, of))
    fields = matrix.data_ptr(), *matrix.shape, *places
    shape = out_features or matrix.shape[0], matrix.shape[1]
    return Prepared(fields, shape, matrix.numel(), (matrix, to, of))
