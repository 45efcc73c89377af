"""`PackedDense`, which in plain PyTorch runs as the `Dense` that it is read as.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from torch import Tensor

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import Dense
from timbre_server.native.panels import out_of_panels
from timbre_server.operators.contract import Bound, Meaning, Operator, Uses
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.row_table import RowTable


class PackedDenseOperator(Operator[PackedDense]):
    part = PackedDense

    def __init__(self) -> None:
        self._dense = DenseOperator()

    def meaning(self, part: PackedDense, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return self._dense.meaning(unpacked(part), x_TI, y_TO)

    def bind(self, uses: Uses[PackedDense], table: RowTable) -> Bound:
        return self._dense.bind(
            [{slot: list(map(unpacked, parts)) for slot, parts in own.items()} for own in uses], table
        )


def unpacked(part: PackedDense) -> Dense:
    """The same in float32."""
    return Dense(out_of_panels(part.panels, *part.shape))
