"""`SlicedEllpack` in C++: every adapter's matrix is read where it lies, once for up to 32 of its rows."""

from __future__ import annotations

from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.operators.native.input_kernels import InputKernelOperator
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.native.structures import numbers_fields
from timbre_server.operators.sliced_ellpack import SlicedEllpackOperator


class NativeSlicedEllpack(InputKernelOperator[SlicedEllpack], SlicedEllpackOperator):
    """`SlicedEllpackOperator` by ``sparse.cpp``."""

    kernel, reads_bfloat16 = "timbre_sparse", True

    def prepared_part(self, part: SlicedEllpack) -> Prepared:
        return prepared_slices(part)


def prepared_slices(part: SlicedEllpack) -> Prepared:
    """As ``Slices`` of ``sparse.cpp``; a part's tensors are contiguous."""
    numbers = part.ranks_O, part.lengths_S, part.columns_KC
    fields = (*(tensor.data_ptr() for tensor in numbers), *numbers_fields(part.values_KC))
    return Prepared(fields, (part.ranks_O.shape[0], part.in_features), part.values_KC.numel(), part)
