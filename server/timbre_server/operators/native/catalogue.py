"""The list of operators in C++."""

from __future__ import annotations

import shutil
from typing import Any

from timbre_server.operators.contract import Operator

COMPILERS = ("g++", "clang++")


def operators() -> tuple[Operator[Any], ...]:
    """One new instance of each; parts that are not among theirs keep the plain operator."""
    return ()


def why_not() -> str | None:
    """Why they cannot run on this machine's CPU, and what to do; None: they can."""
    if not any(shutil.which(compiler) for compiler in COMPILERS):
        return f"no C++ compiler was found; install one of {', '.join(COMPILERS)}"
    return None
