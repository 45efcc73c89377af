"""`PackedDense`, which in plain PyTorch runs as the `Dense` that it is read as."""

from __future__ import annotations

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import Dense
from timbre_server.native.panels import out_of_panels
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.read_as import ReadAsOperator


class PackedDenseOperator(ReadAsOperator[PackedDense]):
    part = PackedDense

    def __init__(self) -> None:
        super().__init__(DenseOperator(), unpacked)


def unpacked(part: PackedDense) -> Dense:
    """The same in float32."""
    return Dense(out_of_panels(part.panels, *part.shape))
