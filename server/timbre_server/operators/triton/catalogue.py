"""The list of operators in Triton."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from timbre_server.operators.contract import Operator
from timbre_server.operators.triton.block import TritonBlock
from timbre_server.operators.triton.diagonal import TritonDiagonal
from timbre_server.operators.triton.low_rank import TritonLowRank
from timbre_server.operators.triton.projected import TritonProjected
from timbre_server.operators.triton.rotation import TritonRotation
from timbre_server.operators.triton.sparse import TritonSparse
from timbre_server.operators.triton.spectral import TritonSpectral


def operators() -> tuple[Operator[Any], ...]:
    """One new instance of each; parts that are not among theirs keep the plain operator."""
    return (
        TritonLowRank(),
        TritonSpectral(),
        TritonSparse(),
        TritonBlock(),
        TritonProjected(),
        TritonDiagonal(),
        TritonRotation(),
    )


def why_not() -> str | None:
    """Why they cannot run on this machine's GPU, and what to do; None: they can."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install 'timbre[gpu]' brings it"
    return None
