"""What is tried at the start: kernels that are right pass, and wrong ones are named."""

from __future__ import annotations

import pytest
import torch

from timbre_methods.program import LowRank
from timbre_server.operators.agreement import wrong_operator
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.contract import Bound, Operator, Uses
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.triton.catalogue import disagreement, operators

CPU = torch.device("cpu")
OWN = [plain for plain in all_operators() if plain.part in {each.part for each in operators()}]
"""The plain operators of the kinds that have kernels."""


class Unweighted(LowRankOperator):
    """Forgets the rows' weights."""

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        spans = [Span(s.num_rows, tuple((slot, 1.0) for slot, _ in s.pairs)) for s in table.spans]
        return super().bind(uses, RowTable(spans, table.device))


class Unshifted(DiagonalOperator):
    """Changes nothing."""

    def bind(self, *_: object) -> Bound:
        return Bound()


def test_plain_operators_compute_what_they_mean() -> None:
    assert wrong_operator(OWN, CPU) is None


@pytest.mark.parametrize("wrong", [Unweighted(), Unshifted()])
def test_the_operator_that_computes_something_else_is_found(wrong: Operator[LowRank]) -> None:
    assert wrong_operator([LowRankOperator(), wrong], CPU) is wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="for Triton's interpreter, which runs on the CPU")
def test_kernels_in_triton_pass() -> None:
    assert disagreement(CPU) is None


@pytest.mark.gpu
def test_kernels_in_triton_pass_on_a_gpu() -> None:
    assert disagreement(torch.device("cuda")) is None
