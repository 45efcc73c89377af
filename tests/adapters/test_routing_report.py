"""Which experts acted: for single rows, and counted, with copies of rows beside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.routing import Routed, RoutedBlock, Router, Rule
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import Block, LinearGroup
from timbre_server.adapters.routing_report import Choice
from timbre_server.operators.row_table import RowTable, Span

SIZE = 6
TOP_2 = Rule(keep="top_k", top_k=2, gate="renormalised")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(SIZE, SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, SIZE), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x)
        return y


def one_hot_router(*experts: int, rule: Rule) -> Router:
    """Expert i's logit is ten times entry ``experts[i]`` of the input."""
    return Router(10 * torch.eye(SIZE)[list(experts)], rule)


def factors() -> LowRank:
    return LowRank(torch.randn(2, SIZE), torch.randn(SIZE, 2))


@pytest.fixture(params=["torch", pytest.param("native", marks=pytest.mark.cpp)])
def model(request: pytest.FixtureRequest) -> tuple[Net, AdaptedModel]:
    """Slot 0 copies rows in the block; slot 1 routes at the layer in it; slot 2 is plain."""
    torch.manual_seed(0)
    net = Net()
    adapted = AdaptedModel(
        net,
        [LinearGroup(("first",)), LinearGroup(("mlp.0",))],
        Arithmetic(kernels=request.param),
        blocks=[Block("mlp", SIZE)],
    )
    block, site = (
        one_hot_router(0, 1, 2, rule=TOP_2),
        one_hot_router(3, 4, rule=Rule(keep="top_k", gate="one")),
    )
    below = Routed(((factors(),), (factors(),), ()), block, from_block=True)
    adapted.put(0, AdapterProgram({"mlp": (RoutedBlock(block, "block"),), "mlp.0": (below,)}))
    adapted.put(1, AdapterProgram({"mlp.0": (Routed(((factors(),), (factors(),)), site),)}))
    adapted.put(2, AdapterProgram({"mlp.0": (factors(),)}))
    return net, adapted


def test_each_row_is_told_its_own_experts(model: tuple[Net, AdaptedModel]) -> None:
    net, adapted = model
    spans = [
        Span(1),
        Span(1, ((0, 1.0),)),
        Span(1, ((0, 1.0), (1, 0.5))),
        Span(1, ((2, 1.0),)),
        Span(1, ((1, 1.0),)),
    ]
    x_TD = torch.zeros(5, SIZE)
    x_TD[1, 2], x_TD[1, 0] = 1.0, 0.9
    x_TD[2, 1], x_TD[2, 4] = 1.0, 1.0
    x_TD[4, 3] = 1.0
    table = RowTable(spans)

    adapted.set_rows(table, table)
    with torch.inference_mode():
        net(x_TD.unsqueeze(0))
    told = adapted.choices_of([0, 1, 2, 3, 4])
    counts = adapted.expert_tokens()
    adapted.clear_rows()

    gates = torch.softmax(torch.tensor([10.0, 9.0]), 0).tolist()
    assert told[0] == told[3] == []
    [choice] = told[1]
    assert (choice.slot, choice.place, choice.experts) == (0, "mlp", (2, 0))
    assert choice.gates == pytest.approx(gates)
    assert [(c.slot, c.place, c.experts) for c in told[2]] == [(0, "mlp", (1, 0)), (1, "mlp.0", (1,))]
    assert told[4] == [Choice(1, "mlp.0", (0,), (1.0,))]
    assert counts == {0: [2, 1, 1], 1: [1, 2]}
    assert adapted.choices_of([1]) == {1: []}
    assert adapted.expert_tokens() == {}


def test_a_slot_that_changes_hands_takes_its_places_along(model: tuple[Net, AdaptedModel]) -> None:
    net, adapted = model
    adapted.drop(0)
    router = one_hot_router(5, rule=Rule())
    adapted.put(0, AdapterProgram({"mlp.0": (Routed(((factors(),),), router),)}))
    table = RowTable([Span(2, ((0, 1.0),))])

    adapted.set_rows(table, table)
    with torch.inference_mode():
        net(torch.ones(1, 2, SIZE))

    assert adapted.choices_of([1]) == {1: [Choice(0, "mlp.0", (0,), (1.0,))]}
    assert adapted.expert_tokens() == {0: [2]}
    adapted.clear_rows()


def test_a_forward_that_runs_once_more_counts_once(model: tuple[Net, AdaptedModel]) -> None:
    net, adapted = model
    table = RowTable([Span(2, ((1, 1.0),)), Span(1)])
    adapted.set_rows(table, table)
    with torch.inference_mode():
        net(torch.ones(1, 3, SIZE))
        adapted.forget_forward()
        assert adapted.expert_tokens() == {}
        assert adapted.choices_of([0]) == {0: []}
        net(torch.ones(1, 3, SIZE))
    assert adapted.expert_tokens() == {1: [2, 0]}
    adapted.clear_rows()


def test_a_router_for_a_block_that_is_not_there_is_our_own_mistake(model: tuple[Net, AdaptedModel]) -> None:
    _, adapted = model
    router = one_hot_router(0, rule=Rule())
    with pytest.raises(AssertionError, match="a block that the model does not have"):
        adapted.put(3, AdapterProgram({"first": (RoutedBlock(router, "sites"),)}))
