"""The list of operators in Triton."""

from __future__ import annotations

from subprocess import SubprocessError
from typing import Any

import torch
from triton.errors import TritonError

from timbre_server.operators.agreement import wrong_operator
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
    """Why they cannot run on this machine's GPU, and what to do; None: they can, and rightly."""
    return disagreement(torch.device("cuda"))


def disagreement(device: torch.device) -> str | None:
    """What keeps them from computing what PyTorch does on a device; a small trial of each."""
    try:
        wrong = wrong_operator(operators(), device)
    except (TritonError, RuntimeError, OSError, ValueError, SubprocessError, AssertionError) as error:
        return f"Triton's kernels fail on this device: {error}"
    return None if wrong is None else f"{type(wrong).__name__} computes something else than PyTorch here"
