"""Experts of low rank in kernels against the twin: what is kept, how many rows, who mixes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import pytest
import torch

from timbre_methods.program import LowRank
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.contract import Operator
from timbre_server.operators.routed import RoutedOperator
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.step_routing import StepRouting

IN, OUTPUTS = 30, (40, 13)
TOP_2 = Rule(keep="top_k", top_k=2, gate="renormalised")
RULES = {
    "all": Rule(),
    "top 1": Rule(keep="top_k", top_k=1, gate="one"),
    "top 2": TOP_2,
    "top p": Rule(keep="top_p", top_p=0.6),
}
CROWDS: Mapping[str, Sequence[Span]] = {
    "identical": [Span(1, ((1, 1.0),))] * 3,
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (2, 0, 1)],
    "mixes": [Span(2, ((0, 0.7), (1, 0.3))), Span(1), Span(8, ((2, 0.25), (0, 2.0)))],
    "prefill": [Span(1, ((1, 1.0),)), Span(9, ((2, 1.0),)), Span(1)],
}


def routed_operator(kernels: str) -> Operator[Routed]:
    operators = all_operators(StepRouting(), kernels)  # type: ignore[arg-type]
    return next(operator for operator in operators if isinstance(operator, RoutedOperator))


def mixture(rule: Rule, experts: int, out: int, twins: ModuleType, generator: torch.Generator) -> Routed:
    """Of several ranks; expert 1 has two parts and expert 2 does nothing here."""

    def expert(rank: int) -> LowRank:
        b_OR = torch.randn(out, rank, generator=generator)
        drawn: LowRank = twins.on_device(LowRank(torch.randn(rank, IN, generator=generator) / 5, b_OR))
        return drawn

    router = Router(torch.randn(experts, IN, generator=generator).to(twins.DEVICE), rule)
    parts = [[expert(1 + 5 * (number % 3))] for number in range(experts)]
    if experts > 2:
        parts[1].append(expert(3))
        parts[2].clear()
    return Routed(tuple(tuple(own) for own in parts), router)


def compare(rule: Rule, experts: int, table: RowTable, twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(experts)
    uses = [
        {slot: [mixture(rule, experts, out, twins, generator)] for slot in slots}
        for out, slots in zip(OUTPUTS, (range(3), (0, 2)), strict=True)
    ]
    x_TI = torch.randn(table.num_rows, IN, generator=generator).to(twins.DEVICE)
    outputs = [torch.zeros(table.num_rows, out, device=twins.DEVICE) for out in OUTPUTS]
    found, expected = (
        twins.totals(routed_operator(kernels).bind(uses, table), x_TI, outputs)
        for kernels in ("triton", "torch")
    )
    for (_, change), (_, wanted) in zip(found, expected, strict=True):
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_crowd_gets_what_the_twin_gives(crowd: str, rule: str, twins: ModuleType) -> None:
    compare(RULES[rule], 4, RowTable(CROWDS[crowd], twins.DEVICE), twins)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_many_experts_of_which_few_act(num_rows: int, twins: ModuleType) -> None:
    compare(TOP_2, 8, RowTable([Span(num_rows, ((0, 1.0),))], twins.DEVICE), twins)


@pytest.mark.parametrize("num_rows", [2, 9])
def test_an_expert_that_no_row_chose_is_not_read(num_rows: int, twins: ModuleType) -> None:
    """Nothing of it arrives, not even what is no number."""
    generator = torch.Generator().manual_seed(3)
    weight_EI = torch.zeros(3, IN)
    weight_EI[:, 0] = torch.tensor([2.0, 1.0, -1.0])
    experts = tuple(
        (twins.on_device(LowRank(torch.randn(4, IN, generator=generator), torch.full((40, 4), value))),)
        for value in (1.0, 2.0, float("nan"))
    )
    routed = Routed(experts, Router(weight_EI.to(twins.DEVICE), TOP_2))
    table = RowTable([Span(num_rows, ((0, 1.0),))], twins.DEVICE)
    x_TI = torch.randn(num_rows, IN, generator=generator).to(twins.DEVICE)
    x_TI[:, 0] = 1.0
    [[change]] = routed_operator("triton").bind([{0: [routed]}], table).sums(x_TI)
    gates_E = torch.softmax(torch.tensor([2.0, 1.0], device=twins.DEVICE), 0)
    z_TE = torch.stack([(x_TI @ expert.a_RI.T).sum(1) for (expert,) in experts[:2]], 1)
    expected_T1 = (z_TE * gates_E * torch.tensor([1.0, 2.0], device=twins.DEVICE)).sum(1, keepdim=True)
    torch.testing.assert_close(change.values_NO, expected_T1.expand(num_rows, 40), atol=1e-5, rtol=1e-5)


def test_gates_are_read_anew_at_each_step(twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(5)
    uses = [{0: [mixture(RULES["top 1"], 4, 40, twins, generator)]}]
    table = RowTable([Span(2, ((0, 1.0),))], twins.DEVICE)
    kernels, twin = (routed_operator(name).bind(uses, table) for name in ("triton", "torch"))
    for _ in range(3):
        x_TI = torch.randn(2, IN, generator=generator).to(twins.DEVICE)
        outputs = [torch.zeros(2, 40, device=twins.DEVICE)]
        [(_, change)], [(_, wanted)] = (twins.totals(bound, x_TI, outputs) for bound in (kernels, twin))
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=1e-5)
