"""The kernel for sparse matrices against the twin: dtype, rows, popularity, and how long a row of it is."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from timbre_methods.program import Sparse
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.sparse import SparseOperator
from timbre_server.operators.triton.sparse import TritonSparse

IN = 37


def matrix(out: int, stored: int, generator: torch.Generator) -> Sparse:
    """``stored`` coefficients anywhere; columns of a row in no order."""
    flat = torch.randperm(out * IN, generator=generator)[:stored]
    rows, order = (flat // IN).sort(stable=True)
    row_ends = torch.searchsorted(rows, torch.arange(out + 1))
    return Sparse(row_ends, (flat[order] % IN).int(), torch.randn(stored, generator=generator), IN)


def compare(
    table: RowTable, parts: dict[int, list[Sparse]], dtype: torch.dtype, out: int, twins: ModuleType
) -> None:
    uses = [{slot: [twins.on_device(part) for part in own] for slot, own in parts.items()}]
    generator = torch.Generator().manual_seed(table.num_rows)
    x_TI = torch.randn(table.num_rows, IN, generator=generator).to(twins.DEVICE, dtype)
    outputs = [torch.zeros(table.num_rows, out, device=twins.DEVICE)]
    [(_, change)] = twins.totals(TritonSparse().bind(uses, table), x_TI, outputs)
    [(_, wanted)] = twins.totals(SparseOperator().bind(uses, table), x_TI.float(), outputs)
    torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
def test_every_crowd_gets_what_the_twin_gives(crowd: str, twins: ModuleType) -> None:
    twins.check(TritonSparse(), SparseOperator(), lambda out, g: matrix(out, 60, g), crowd, IN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [1, 11])
def test_any_dtype_of_the_input(num_rows: int, dtype: torch.dtype, twins: ModuleType) -> None:
    part = matrix(20, 90, torch.Generator().manual_seed(1))
    table = RowTable([Span(num_rows, ((0, 1.0),)), Span(1)], twins.DEVICE)
    compare(table, {0: [part]}, dtype, 20, twins)


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("longest", [0, 1, 32, 37])
def test_one_long_row_among_empty_ones(longest: int, num_rows: int, twins: ModuleType) -> None:
    row_ends = torch.tensor([0] * 3 + [longest] * 18)
    columns = torch.randperm(IN, generator=torch.Generator().manual_seed(2))[:longest].int()
    part = Sparse(row_ends, columns, torch.arange(1.0, longest + 1), IN)
    compare(RowTable([Span(num_rows, ((0, 2.0),))], twins.DEVICE), {0: [part]}, torch.float32, 20, twins)


def test_a_table_of_base_rows_has_no_changes(twins: ModuleType) -> None:
    part = twins.on_device(matrix(20, 9, torch.Generator().manual_seed(1)))
    bound = TritonSparse().bind([{0: [part]}], RowTable([Span(2)], twins.DEVICE))
    assert list(bound.sums(torch.ones(2, IN, device=twins.DEVICE))) == [[]]
