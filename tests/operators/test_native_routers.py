"""Routers in C++ against PyTorch: every rule, how many rows, whose routers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from timbre_methods.routing import Router, Rule
from timbre_server.operators.native.routers import NativeRouters
from timbre_server.operators.router import BoundRouters
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

IN = 45
KEPT = (Rule(), Rule(keep="top_k", top_k=2), Rule(keep="top_k", top_k=99), Rule(keep="top_p", top_p=0.7))
RULES = [
    replace(rule, logits=logits, gate=gate, scale=scale)
    for rule, logits, gate, scale in product(
        KEPT, ("plain", "absolute", "unit"), ("softmax", "renormalised", "logit", "one"), (1.0, 2.5)
    )
]
CROWDS = {
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (2, 0, 1)],
    "mixes": [Span(2, ((0, 0.7), (1, 0.3))), Span(1), Span(8, ((2, 0.25), (0, 2.0)))],
    "prefill": [Span(1, ((1, 1.0),)), Span(30, ((2, 1.0),)), Span(1)],
}


def agree(rules: list[Rule], crowd: str, generator: torch.Generator) -> None:
    """Adapters with one to three routers of these rules each, with biases and preferences or none."""
    table = RowTable(CROWDS[crowd])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rule = iter(rules * 9)
    routers = []
    for segment in table.segments:
        own = []
        for number in range(segment.slot + 1):
            experts = 4 + segment.slot + number
            terms = normal(2, experts) if number % 2 == 0 else (None, None)
            own.append(Router(normal(IN, experts).T / 5, next(rule), *terms))
        routers.append((segment, own))
    x_TI = normal(IN, table.num_rows).T
    native, plain = (kind(routers).gates(x_TI) for kind in (NativeRouters, BoundRouters))
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_rule_gives_what_pytorch_gives(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    agree([rule], "mixes", generator)


@pytest.mark.parametrize("gate", ["softmax", "renormalised", "logit", "one"])
@pytest.mark.parametrize("keep", ["all", "top_k", "top_p"])
def test_floors_act_before_gates_meet_again(keep: str, gate: str) -> None:
    generator = torch.Generator().manual_seed(1)
    rules = [
        Rule(keep=keep, gate=gate, top_k=3, top_p=0.8, floor=floor, again=again, reads=reads)  # type: ignore[arg-type]
        for floor, again, reads in product((None, 0.3, 99.0), (False, True), ("input", "normalised"))
    ]
    agree(rules, "mixes", generator)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("crowd", CROWDS)
def test_every_crowd_gets_what_pytorch_gives(crowd: str) -> None:
    agree(RULES[::5], crowd, torch.Generator().manual_seed(2))


def test_of_equal_logits_the_first_are_kept_and_what_is_no_number_stays_in_its_row() -> None:
    (segment,) = RowTable([Span(3, ((0, 1.0),))]).segments
    router = Router(torch.ones(5, IN), Rule(keep="top_k", top_k=2, gate="renormalised"))
    x_TI = torch.ones(3, IN)
    x_TI[1] = torch.nan
    (gates_NK,) = NativeRouters([(segment, [router])]).gates(x_TI)
    assert gates_NK[::2].tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]] * 2
    (plain_NK,) = BoundRouters([(segment, [router])]).gates(x_TI)
    torch.testing.assert_close(gates_NK, plain_NK, equal_nan=True)
