"""The lists of operators. A new kind of part needs its operator here, and nowhere else.

Each is in plain PyTorch, which is its meaning and runs everywhere. A package of *kernels* may have a faster
one for the same part: a subclass that overrides `bind`, held to the same laws. Such a package has two
functions in its ``catalogue``: `operators`, and `why_not`, which says what is missing on this machine. It is
imported when it is asked for and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

from timbre_server.operators.block import BlockOperator
from timbre_server.operators.circulant import CirculantOperator
from timbre_server.operators.contract import Operator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.kronecker import KroneckerOperator
from timbre_server.operators.lookup import LookupDense, LookupLowRank, LookupTokenRows
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.packed_dense import PackedDenseOperator
from timbre_server.operators.packed_projected import PackedProjectedOperator
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.sliced_ellpack import SlicedEllpackOperator
from timbre_server.operators.sparse import SparseOperator
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.step_routing import StepRouting

Kernels = Literal["torch", "native", "triton"]
"""``torch``: plain PyTorch; ``native``: C++ on a CPU; ``triton``: Triton on a GPU."""


def all_operators(step: StepRouting | None = None, kernels: Kernels = "torch") -> tuple[Operator[Any], ...]:
    """One new instance of each operator; instances may keep what they derive from shared bases.

    ``step``: where routers leave what they give, and blocks what they choose. Parts for which ``kernels``
    have no operator keep the plain one.
    """
    plain: tuple[Operator[Any], ...] = (
        LowRankOperator(),
        SpectralOperator(),
        CirculantOperator(),
        SparseOperator(),
        SlicedEllpackOperator(),
        BlockOperator(),
        DenseOperator(),
        PackedDenseOperator(),
        KroneckerOperator(),
        ProjectedOperator(),
        PackedProjectedOperator(),
        DiagonalOperator(),
        RotationOperator(),
    )
    faster = {operator.part: operator for operator in _operators_of(kernels)}
    chosen = tuple(faster.get(operator.part, operator) for operator in plain)
    return (*chosen, _routed(chosen, step or StepRouting(), kernels))


def why_not(kernels: Kernels) -> str | None:
    """Why these kernels cannot run on this machine, and what to do; None: they can."""
    match kernels:
        case "torch":
            return None
        case "native":
            from timbre_server.operators.native import catalogue as native

            return native.why_not()
        case "triton":
            if find_spec("triton") is None:
                return "Triton is not installed; pip install 'timbre[gpu]' brings it"
            from timbre_server.operators.triton import catalogue as triton

            return triton.why_not()


def _operators_of(kernels: Kernels) -> tuple[Operator[Any], ...]:
    match kernels:
        case "torch":
            return ()
        case "native":
            from timbre_server.operators.native import catalogue as native

            return native.operators()
        case "triton":
            from timbre_server.operators.triton import catalogue as triton

            return triton.operators()


def _routed(inner: Sequence[Operator[Any]], step: StepRouting, kernels: Kernels) -> RoutedOperator:
    if kernels == "native":
        from timbre_server.operators.native.routed import NativeRouted
        from timbre_server.operators.native.routers import NativeRouters

        return NativeRouted(inner, step, NativeRouters)
    return RoutedOperator(inner, step)


def embedding_operators() -> tuple[Operator[Any], ...]:
    """The same for layers whose input is token ids, of the parts that methods have there."""
    return (LookupLowRank(), LookupDense(), LookupTokenRows(), DiagonalOperator(), RotationOperator())
