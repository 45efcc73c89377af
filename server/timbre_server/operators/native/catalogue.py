"""The list of operators in C++."""

from __future__ import annotations

from typing import Any

import torch

from timbre_server.native.library import LibraryUnavailable, library
from timbre_server.operators.agreement import wrong_operator
from timbre_server.operators.contract import Operator
from timbre_server.operators.native import routers
from timbre_server.operators.native.block import NativeBlock, NativeDense, NativePackedDense
from timbre_server.operators.native.circulant import NativeCirculant
from timbre_server.operators.native.diagonal import NativeDiagonal
from timbre_server.operators.native.kronecker import NativeKronecker
from timbre_server.operators.native.low_rank import NativeLowRank
from timbre_server.operators.native.projected import NativePackedProjected, NativeProjected
from timbre_server.operators.native.rotation import NativeRotation
from timbre_server.operators.native.sliced_ellpack import NativeSlicedEllpack
from timbre_server.operators.native.spectral import NativeSpectral


def operators() -> tuple[Operator[Any], ...]:
    """One new instance of each; parts that are not among theirs keep the plain operator."""
    return (
        NativeLowRank(),
        NativeSpectral(),
        NativeSlicedEllpack(),
        NativeProjected(),
        NativePackedProjected(),
        NativeDiagonal(),
        NativeRotation(),
        NativeKronecker(),
        NativeBlock(),
        NativeDense(),
        NativePackedDense(),
        NativeCirculant(),
    )


def why_not() -> str | None:
    """Why they cannot run on this machine's CPU, and what to do; None: they can, and rightly."""
    try:
        library()
    except LibraryUnavailable as error:
        return str(error)
    wrong = wrong_operator(operators(), torch.device("cpu"), counts=(1, 11, 600))
    if wrong is not None:
        return f"{type(wrong).__name__}, as it was compiled, computes something else than PyTorch"
    if not routers.agree():
        return "the routers, as they were compiled, give other gates than PyTorch's"
    return None
