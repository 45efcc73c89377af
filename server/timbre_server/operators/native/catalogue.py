"""The list of operators in C++."""

from __future__ import annotations

from typing import Any

import torch

from timbre_methods.program import LowRank, Part, Places, Sparse, Spectral
from timbre_server.operators.contract import Operator
from timbre_server.operators.native.library import LibraryUnavailable, library
from timbre_server.operators.native.low_rank import NativeLowRank
from timbre_server.operators.native.sparse import NativeSparse
from timbre_server.operators.native.spectral import NativeSpectral
from timbre_server.operators.row_table import RowTable, Span

_TOLERANCE = 1e-4


def operators() -> tuple[Operator[Any], ...]:
    """One new instance of each; parts that are not among theirs keep the plain operator."""
    return (NativeLowRank(), NativeSpectral(), NativeSparse())


def why_not() -> str | None:
    """Why they cannot run on this machine's CPU, and what to do; None: they can, and rightly."""
    try:
        library()
    except LibraryUnavailable as error:
        return str(error)
    wrong = [operator for operator in operators() if not _computes_its_meaning(operator)]
    if wrong:
        return f"{type(wrong[0]).__name__}, as it was compiled, computes something else than PyTorch"
    return None


def _computes_its_meaning(operator: Operator[Any]) -> bool:
    """Try one small part on one and on several rows."""
    generator = torch.Generator().manual_seed(0)
    part = _example(operator, generator)
    for num_rows in (1, 11):
        x_TI, y_TO = torch.randn(num_rows, 24, generator=generator), torch.zeros(num_rows, 20)
        change_TO = operator.meaning(part, x_TI, y_TO).change_TO
        table = RowTable([Span(num_rows, ((0, 0.5),))])
        for change in operator.bind([{0: [part]}], table).sums(x_TI)[0]:
            change.add_to(y_TO)
        if change_TO is None or not torch.allclose(y_TO, 0.5 * change_TO, rtol=_TOLERANCE, atol=_TOLERANCE):
            return False
    return True


def _example(operator: Operator[Any], generator: torch.Generator) -> Part:
    if operator.part is LowRank:
        return LowRank(torch.randn(9, 24, generator=generator), torch.randn(20, 9, generator=generator))
    if operator.part is Spectral:
        rows_N, columns_N = (torch.randint(n, (30,), generator=generator) for n in (20, 24))
        return Spectral(torch.randn(30, generator=generator), Places("dft", 20, 24, rows_N, columns_N))
    counts_O = torch.randint(4, (20,), generator=generator)
    row_ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts_O.cumsum(0)])
    columns_N = torch.cat([torch.randperm(24, generator=generator)[: int(n)] for n in counts_O]).int()
    return Sparse(row_ends, columns_N, torch.randn(len(columns_N), generator=generator), 24)
