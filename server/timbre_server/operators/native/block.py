"""`Block` and dense changes in C++: every adapter's matrix is read where it lies, once for a few rows.

Legend: O out, I in, N channels of a block.
"""

from __future__ import annotations

from torch import Tensor

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import Block, Dense
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.native.input_kernels import InputKernelOperator
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.packed_dense import PackedDenseOperator


class NativeBlock(InputKernelOperator[Block], BlockOperator):
    """`BlockOperator` by ``block.cpp``."""

    kernel = "timbre_block"

    def prepared_part(self, part: Block) -> Prepared | None:
        if not part.block.numel():
            return None
        index_N = part.index_N.contiguous()
        to, of = (None, index_N) if part.side == "input" else (index_N, None)
        return _prepared(part.block, to, of, part.out_features)


class NativeDense(InputKernelOperator[Dense], DenseOperator):
    """`DenseOperator` by ``block.cpp``, too."""

    kernel = "timbre_block"

    def prepared_part(self, part: Dense) -> Prepared:
        return _prepared(part.delta_OI, None, None)


class NativePackedDense(InputKernelOperator[PackedDense], PackedDenseOperator):
    """`PackedDenseOperator` by ``packed_dense.cpp``, of rows that are rounded to bfloat16."""

    kernel = "timbre_packed_dense"

    def prepared_part(self, part: PackedDense) -> Prepared:
        """As ``Matrix`` of ``matrices.h``."""
        num_out, num_in = part.shape
        return Prepared((part.panels.data_ptr(), num_out, num_in, 0), part.shape, num_out * num_in, part)


def _prepared(
    matrix: Tensor, to: Tensor | None, of: Tensor | None, out_features: int | None = None
) -> Prepared:
    """As ``Block`` of ``block.cpp``."""
    matrix = matrix.contiguous()
    places = (0 if index is None else index.data_ptr() for index in (to, of))
    fields = matrix.data_ptr(), *matrix.shape, *places
    shape = out_features or matrix.shape[0], matrix.shape[1]
    return Prepared(fields, shape, matrix.numel(), (matrix, to, of))
