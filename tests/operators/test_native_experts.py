"""Experts of low rank in C++ against PyTorch: what is kept, how many rows, who mixes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.step_routing import StepRouting

pytestmark = pytest.mark.cpp

IN, OUTPUTS = 30, (40, 13)
RULES = {
    "all": Rule(),
    "top 1": Rule(keep="top_k", top_k=1, gate="one"),
    "top 2": Rule(keep="top_k", top_k=2, gate="renormalised"),
    "top p": Rule(keep="top_p", top_p=0.6),
}
CROWDS = {
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (2, 0, 1)],
    "mixes": [Span(2, ((0, 0.7), (1, 0.3))), Span(1), Span(8, ((2, 0.25), (0, 2.0)))],
    "prefill": [Span(1, ((1, 1.0),)), Span(9, ((2, 1.0),)), Span(1)],
}


def mixture(rule: Rule, out: int, generator: torch.Generator) -> Routed:
    """Four experts of several ranks; expert 1 has two parts and expert 2 does nothing here."""

    def expert(rank: int) -> LowRank:
        a_RI = torch.randn(rank, IN, generator=generator) / 5
        return LowRank(a_RI, torch.randn(out, rank, generator=generator))

    experts = ((expert(1),), (expert(6), expert(3)), (), (expert(11),))
    return Routed(experts, Router(torch.randn(4, IN, generator=generator), rule))


def totals(kernels: str, uses: list[dict[int, list[Routed]]], table: RowTable, x_TI: Tensor) -> list[Tensor]:
    operators = all_operators(StepRouting(), kernels)  # type: ignore[arg-type]
    operator = next(operator for operator in operators if isinstance(operator, RoutedOperator))
    found = [torch.zeros(table.num_rows, out) for out in OUTPUTS]
    for changes, sum_TO in zip(operator.bind(uses, table).sums(x_TI), found, strict=True):
        for change in changes:
            change.add_to(sum_TO)
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_crowd_gets_what_pytorch_gives(crowd: str, rule: str) -> None:
    generator, table = torch.Generator().manual_seed(0), RowTable(CROWDS[crowd])
    # The second member is adapted by only some of them.
    uses: list[dict[int, list[Routed]]] = [
        {slot: [mixture(RULES[rule], out, generator)] for slot in slots}
        for out, slots in zip(OUTPUTS, (range(3), (0, 2)), strict=True)
    ]
    x_TI = torch.randn(table.num_rows, IN, generator=generator)
    native, plain = (totals(kernels, uses, table, x_TI) for kernels in ("native", "torch"))
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_experts_that_no_router_chose_spoil_nothing() -> None:
    generator, table = torch.Generator().manual_seed(0), RowTable([Span(1, ((0, 1.0),))])
    part = mixture(RULES["top 1"], OUTPUTS[0], generator)
    assert part.own_router is not None
    x_TI = part.own_router.weight_EI[:1]
    sound = totals("native", [{0: [part]}, {}], table, x_TI)[0]
    for others in part.experts[1:]:
        for low_rank in others:
            assert isinstance(low_rank, LowRank)
            low_rank.b_OR.fill_(torch.nan)
    assert sound.any()
    assert torch.equal(totals("native", [{0: [part]}, {}], table, x_TI)[0], sound)
