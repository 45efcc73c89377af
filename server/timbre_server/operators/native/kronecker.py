"""`Kronecker` in C++: every adapter's matrices are read where they lie.

Legend: I in, O out; L, M, K, N, R as in `timbre_methods.program.Kronecker`.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from timbre_methods.program import Kronecker
from timbre_server.operators.kronecker import KroneckerOperator
from timbre_server.operators.native.input_kernels import InputKernelOperator
from timbre_server.operators.native.prepared import Prepared
from timbre_server.operators.native.structures import Fields


class NativeKronecker(InputKernelOperator[Kronecker], KroneckerOperator):
    """`KroneckerOperator` by ``kronecker.cpp``."""

    kernel = "timbre_kronecker"

    def prepared_part(self, part: Kronecker) -> Prepared:
        """As ``Kronecker`` of ``kronecker.cpp``."""
        w1_LM = part.w1_LM.contiguous()
        factors = [f.contiguous() for f in (part.w2_RN, part.w2_KR) if f is not None]
        works = [_work(w1_LM, factors, before) for before in range(len(factors) + 1)]
        before = works.index(min(works))
        w2_fields = [_matrix_fields(factor) for factor in factors] + [(0, 0, 0)]
        fields = *_matrix_fields(w1_LM), *w2_fields[0], *w2_fields[1], len(factors), before
        shape = w1_LM.shape[0] * factors[-1].shape[0], w1_LM.shape[1] * factors[0].shape[1]
        return Prepared(fields, shape, works[before], (w1_LM, factors))


def _matrix_fields(matrix: Tensor) -> Fields:
    return matrix.data_ptr(), *matrix.shape


def _work(w1_LM: Tensor, factors: list[Tensor], before: int) -> int:
    """Multiplications for one row where so many of w2's factors come before w1."""
    l_size, m_size = w1_LM.shape
    sizes = [factors[0].shape[1], *(factor.shape[0] for factor in factors)]
    beside = (m_size if number < before else l_size for number in range(len(factors)))
    return sum(map(prod, zip(beside, sizes, sizes[1:], strict=False))) + l_size * m_size * sizes[before]
