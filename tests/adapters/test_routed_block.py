"""Blocks in which routers choose, against the loop of a paper: token by token, expert by expert.

Legend: T rows, I in features, O out, D hidden size, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from timbre_methods.program import AdapterProgram, LowRank, Part
from timbre_methods.routing import Routed, RoutedBlock, Router, Rule
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.groups import Block, LinearGroup
from timbre_server.operators.row_table import Pairs, RowTable, Span

D, INNER = 12, 20
TOP_2 = Rule(keep="top_k", top_k=2, gate="renormalised")
TOP_P = Rule(keep="top_p", top_p=0.7)
TOP_1 = Rule(keep="top_k", gate="one")
DENSE = Rule()
MLP_SITES = ("mlp.gate", "mlp.up", "mlp.down")


class GatedMlp(nn.Module):
    def __init__(self, *, bias: bool, ends_with_scale: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, INNER, bias), nn.Linear(D, INNER, bias)
        self.down = nn.Linear(INNER, D, bias)
        self.ends_with_scale = ends_with_scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return y * 0.5 if self.ends_with_scale else y


class PlainMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(gelu(self.up(x)))
        return y


class Net(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp
        self.after = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(x + self.mlp(x))
        return y


MLPS = {
    "gated": lambda: GatedMlp(bias=False, ends_with_scale=False),
    "gated, with biases": lambda: GatedMlp(bias=True, ends_with_scale=False),
    "gated, not ending in its last layer": lambda: GatedMlp(bias=True, ends_with_scale=True),
    "plain": PlainMlp,
}


@pytest.fixture(scope="module")
def gates(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The tests' own reading of routers."""
    return load_module(Path(__file__).parents[1] / "methods" / "gates.py")


class Bench:
    """A small network with a block, several adapters on it, and the literal loop over tokens."""

    def __init__(self, mlp: str, gates: ModuleType) -> None:
        torch.manual_seed(5)
        self.net = Net(MLPS[mlp]())
        self.plain = Net(MLPS[mlp]()).double()
        self.plain.load_state_dict(self.net.state_dict())
        self.gates = gates
        self.paths = [path for path in MLP_SITES if hasattr(self.net.mlp, path.removeprefix("mlp."))]
        last = None if mlp.endswith("last layer") else "mlp.down"
        groups = [LinearGroup(tuple(p for p in self.paths if p != "mlp.down")), LinearGroup(("mlp.down",))]
        groups.append(LinearGroup(("after",)))
        self.adapted = AdaptedModel(self.net, groups, blocks=[Block("mlp", D, last)])
        self.programs = [
            self.mixture(TOP_2, "block", num_experts=4),
            self.mixture(TOP_1, "block", num_experts=3),
            self.mixture(DENSE, "sites", num_experts=3),
            AdapterProgram({path: (self.factors(path),) for path in (*self.paths, "after")}),
            self.mixture(TOP_P, "block", num_experts=5),
            self.mixture(TOP_2, "block", num_experts=4),
        ]
        for slot, program in enumerate(self.programs):
            self.adapted.put(slot, program)

    def factors(self, path: str) -> LowRank:
        layer = self.plain.get_submodule(path)
        rank = int(torch.randint(1, 4, ()))
        return LowRank(torch.randn(rank, layer.in_features) / 2, torch.randn(layer.out_features, rank) / 2)

    def mixture(self, rule: Rule, meet: str, num_experts: int) -> AdapterProgram:
        """Experts at each site of the block, one of which lacks the last; and a plain part after it."""
        router = Router(torch.randn(num_experts, D), rule, torch.randn(num_experts))
        sites: dict[str, tuple[Part, ...]] = {"mlp": (RoutedBlock(router, meet),)}
        for path in self.paths:
            experts = [(self.factors(path),) for _ in range(num_experts)]
            if path == "mlp.down":
                experts[1] = ()
            sites[path] = (Routed(tuple(experts), router, from_block=True),)
        return AdapterProgram({**sites, "after": (self.factors("after"),)})

    def run(self, spans: Sequence[Span], x_TD: Tensor) -> Tensor:
        table = RowTable(spans)
        self.adapted.set_rows(table, table)
        with torch.inference_mode():
            y_TD = self.net(x_TD.unsqueeze(0))[0]
        self.adapted.clear_rows()
        return y_TD

    def expected(self, pairs: Pairs, x_D: Tensor) -> Tensor:
        """One token: for each joint choice of experts the whole block, in float64."""
        choices = [self.choices(self.programs[slot], x_D) for slot, _ in pairs]
        total_D = torch.zeros(D, dtype=torch.float64)
        for joint in itertools.product(*choices):
            gate = 1.0
            for own_gate, _ in joint:
                gate *= own_gate
            if gate:
                deltas = {
                    path: sum(
                        weight * self.delta(self.programs[slot], path, experts)
                        for (slot, weight), (_, experts) in zip(pairs, joint, strict=True)
                    )
                    for path in self.paths
                }
                total_D += gate * self.block(deltas, x_D)
        after = sum(weight * self.delta(self.programs[slot], "after", {}) for slot, weight in pairs)
        layer = self.plain.after
        return (layer.weight + after) @ (x_D + total_D) + layer.bias

    def choices(self, program: AdapterProgram, x_D: Tensor) -> list[tuple[float, dict[int, float]]]:
        """What may act in the block: its gate after the block, and the experts with their gates at sites."""
        part = next(iter(program.sites.get("mlp", ())), None)
        if part is None:
            return [(1.0, {})]
        assert isinstance(part, RoutedBlock)
        gates_E = self.gates.gates(part.router, x_D.unsqueeze(0))[0].tolist()
        if part.meet == "sites":
            return [(1.0, dict(enumerate(gates_E)))]
        return [(gate, {expert: 1.0}) for expert, gate in enumerate(gates_E)]

    def delta(self, program: AdapterProgram, path: str, experts: dict[int, float]) -> Tensor:
        layer = self.plain.get_submodule(path)
        total_OI = torch.zeros_like(layer.weight)
        for part in program.sites.get(path, ()):
            if isinstance(part, LowRank):
                total_OI = total_OI + part.b_OR.double() @ part.a_RI.double()
            elif isinstance(part, Routed):
                for expert, gate in experts.items():
                    for inner in part.experts[expert]:
                        total_OI = total_OI + gate * inner.b_OR.double() @ inner.a_RI.double()
        return total_OI

    def block(self, deltas: dict[str, Tensor | int], x_D: Tensor) -> Tensor:
        changed = {
            f"{path.removeprefix('mlp.')}.weight": self.plain.get_submodule(path).weight + delta
            for path, delta in deltas.items()
        }
        y_1D: Tensor = torch.func.functional_call(self.plain.mlp, changed, (x_D.unsqueeze(0),))
        return y_1D[0]


CROWDS = {
    "one row each": [Span(1, ((slot, 1.0),)) for slot in range(6)] + [Span(1)],
    "many rows": [Span(9, ((0, 1.0),)), Span(2), Span(7, ((4, 1.0),)), Span(6, ((2, 1.0),))],
    "rows of one adapter apart": [Span(2, ((0, 1.0),)), Span(1, ((3, 1.0),)), Span(3, ((0, 1.0),))],
    "nobody copies": [Span(2, ((1, 1.0),)), Span(5, ((2, 1.0),)), Span(1)],
    "mixes": [
        Span(2, ((0, 0.7), (3, -0.5))),
        Span(2, ((0, 1.5), (5, 0.5))),
        Span(1, ((2, 0.3), (1, 0.7), (3, 1.0))),
        Span(3, ((4, 0.6), (0, 0.4))),
        Span(2),
        Span(1, ((5, 1.0),)),
    ],
}


@pytest.mark.parametrize("mlp", MLPS)
@pytest.mark.parametrize("crowd", CROWDS)
def test_each_token_gets_what_the_loop_over_its_experts_gives(
    crowd: str, mlp: str, gates: ModuleType
) -> None:
    bench = Bench(mlp, gates)
    spans = CROWDS[crowd]
    x_TD = torch.randn(sum(span.num_rows for span in spans), D)

    for _ in range(2):
        y_TD = bench.run(spans, x_TD)

    pairs = [span.pairs for span in spans for _ in range(span.num_rows)]
    expected_TD = torch.stack([bench.expected(own, x.double()) for own, x in zip(pairs, x_TD, strict=True)])
    torch.testing.assert_close(y_TD.double(), expected_TD, atol=2e-5, rtol=1e-5)


def test_base_rows_keep_their_bits_beside_rows_that_are_copied(gates: ModuleType) -> None:
    bench = Bench("gated", gates)
    x_TD = torch.randn(8, D)

    alone = bench.run([Span(8)], x_TD)
    beside = bench.run([Span(6), Span(2, ((0, 1.0),))], x_TD)

    torch.testing.assert_close(beside[:6], alone[:6], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(beside[6:], alone[6:], atol=1e-3)


def test_a_forward_that_fails_in_the_block_leaves_nothing_to_the_next(gates: ModuleType) -> None:
    bench = Bench("gated", gates)
    x_TD = torch.randn(3, D)
    spans = [Span(3, ((0, 1.0),))]
    expected = bench.run(spans, x_TD)
    table = RowTable(spans)
    bench.adapted.set_rows(table, table)
    hook = bench.net.mlp.down.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.inference_mode():
        bench.net(x_TD.unsqueeze(0))
    bench.adapted.clear_rows()
    hook.remove()

    assert torch.equal(bench.run(spans, x_TD), expected)
    base = bench.plain.float()(x_TD)
    torch.testing.assert_close(bench.run([Span(3)], x_TD), base, atol=1e-6, rtol=1e-6)
