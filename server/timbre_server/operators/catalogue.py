"""The lists of operators. A new kind of part needs its operator here, and nowhere else."""

from __future__ import annotations

from typing import Any

from timbre_server.operators.block import BlockOperator
from timbre_server.operators.circulant import CirculantOperator
from timbre_server.operators.contract import Operator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.kronecker import KroneckerOperator
from timbre_server.operators.lookup import LookupDense, LookupLowRank, LookupTokenRows
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.sparse import SparseOperator
from timbre_server.operators.spectral import SpectralOperator
from timbre_server.operators.step_routing import StepRouting


def all_operators(step: StepRouting | None = None) -> tuple[Operator[Any], ...]:
    """One new instance of each operator; instances may keep what they derive from shared bases.

    ``step``: where routers leave what they give, and blocks what they choose.
    """
    plain = (
        LowRankOperator(),
        SpectralOperator(),
        CirculantOperator(),
        SparseOperator(),
        BlockOperator(),
        DenseOperator(),
        KroneckerOperator(),
        ProjectedOperator(),
        DiagonalOperator(),
        RotationOperator(),
    )
    return (*plain, RoutedOperator(plain, step or StepRouting()))


def embedding_operators() -> tuple[Operator[Any], ...]:
    """The same for layers whose input is token ids, of the parts that methods have there."""
    return (LookupLowRank(), LookupDense(), LookupTokenRows(), DiagonalOperator(), RotationOperator())
