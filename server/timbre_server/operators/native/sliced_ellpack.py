"""`SlicedEllpack` in C++: every adapter's matrix is read where it lies, once for as many as 32 of its rows.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.operators.contract import Members, Standing, StandingOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.narrow_inputs import BoundNarrowInputKernels
from timbre_server.operators.native.uses import (
    Prepared,
    PreparedParts,
    Sources,
    numbers_fields,
)
from timbre_server.operators.sliced_ellpack import SlicedEllpackOperator


class NativeSlicedEllpack(StandingOperator[SlicedEllpack, PreparedParts], SlicedEllpackOperator):
    """`SlicedEllpackOperator` by ``sparse.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[SlicedEllpack]) -> PreparedParts:
        return PreparedParts([[prepared_slices(part) for part in own] for own in members])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundNarrowInputKernels("timbre_sparse", rows, self._sources)


def prepared_slices(part: SlicedEllpack) -> Prepared:
    """As ``Slices`` of ``sparse.cpp``; a part's tensors are contiguous."""
    numbers = part.ranks_O, part.lengths_S, part.columns_KC
    fields = (*(tensor.data_ptr() for tensor in numbers), *numbers_fields(part.values_KC))
    return Prepared(fields, (part.ranks_O.shape[0], part.in_features), part.values_KC.numel(), part)
