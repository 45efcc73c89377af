"""Parts that are laid out for C++: in plain PyTorch they run as those that they were made of.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from timbre_server.operators.contract import Bound, Meaning, Operator, PartT, Uses
from timbre_server.operators.row_table import RowTable


class ReadAsOperator(Operator[PartT]):
    """What ``plain`` does with the parts that ``read`` gives."""

    def __init__(self, plain: Operator[Any], read: Callable[[PartT], Any]) -> None:
        self._plain, self._read = plain, read

    def meaning(self, part: PartT, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return self._plain.meaning(self._read(part), x_TI, y_TO)

    def bind(self, uses: Uses[PartT], table: RowTable) -> Bound:
        return self._plain.bind(
            [{slot: list(map(self._read, parts)) for slot, parts in own.items()} for own in uses], table
        )
