"""A gated MLP of the base, and the compiled program of a mixture in it: row by row and expert by expert.

The tests' own reading of blocks; shares nothing with the server.

Legend: T rows, D features of the MLP's input and output, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram
from timbre_methods.routing import Routed, RoutedBlock, Router

Activation = Callable[[Tensor], Tensor]
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Mlp:
    """``W_down (act(W_gate x + b_gate) ∘ (W_up x + b_up)) + b_down``, in float64."""

    path: str
    sites: dict[str, Site]
    act: Activation
    evaluate: ModuleType
    """The tests' evaluator of parts."""

    def base(self, name: str, x: Tensor) -> Tensor:
        """What the base gives at one projection for one row."""
        site = self.sites[f"{self.path}.{name}"]
        assert site.bias_O is not None
        return site.weight_OI.double() @ x + site.bias_O.double()

    def adapted(self, program: AdapterProgram, x_TD: Tensor) -> Tensor:
        """The whole MLP under a program, [T, D]."""
        return torch.stack([self._row(program, x_D) for x_D in x_TD])

    def _row(self, program: AdapterProgram, x_D: Tensor) -> Tensor:
        (chosen,) = program.sites[self.path]
        assert isinstance(chosen, RoutedBlock)
        gates_E = self.evaluate.gates.gates(chosen.router, x_D.unsqueeze(0))[0]
        if chosen.meet == "sites":
            return self._forward(program, chosen.router, gates_E, x_D)
        one_hot_EE = torch.eye(len(gates_E), dtype=torch.float64)
        experts = [
            gate * self._forward(program, chosen.router, alone_E, x_D)
            for gate, alone_E in zip(gates_E, one_hot_EE, strict=True)
            if gate != 0
        ]
        return torch.stack(experts).sum(0)

    def _forward(self, program: AdapterProgram, router: Router, gates_E: Tensor, x_D: Tensor) -> Tensor:
        def layer(name: str, x: Tensor) -> Tensor:
            y0 = y = self.base(name, x)
            for part in program.sites.get(f"{self.path}.{name}", ()):
                assert isinstance(part, Routed)
                assert part.from_block
                assert part.router is router
                for gate, expert in zip(gates_E, part.experts, strict=True):
                    for inner in expert:
                        y = y + gate * self.evaluate.change(inner, x.unsqueeze(0), y0.unsqueeze(0))[0]
            return y

        return layer("down_proj", self.act(layer("gate_proj", x_D)) * layer("up_proj", x_D))


def make(evaluate: ModuleType, act: Activation, layers: str = "model.layers") -> Mlp:
    """Layer 0 of a make-believe base: its MLP from 6 over 9 features, and one projection of its attention."""
    path = f"{layers}.0.mlp"
    generator = torch.Generator().manual_seed(3)

    def site(where: str, out_features: int, in_features: int) -> Site:
        weight_OI = torch.randn(out_features, in_features, generator=generator)
        return Site(where, weight_OI, torch.randn(out_features, generator=generator))

    made = [
        site(f"{layers}.0.self_attn.q_proj", 4, 6),
        site(f"{path}.gate_proj", 9, 6),
        site(f"{path}.up_proj", 9, 6),
        site(f"{path}.down_proj", 6, 9),
        Site(path, torch.empty(6, 6, device="meta"), None, "block"),
    ]
    return Mlp(path, {each.path: each for each in made}, act, evaluate)
