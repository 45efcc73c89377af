"""Whole models that compute what a compiled program says, module by module, for comparison with PEFT's.

The tests' own: what parts mean is in `evaluate`, and nothing is shared with the server.

Legend: T tokens, D features, E experts.
"""

from __future__ import annotations

import copy
from types import ModuleType

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Part
from timbre_methods.routing import RoutedBlock


class AdaptedLinear(nn.Module):
    """A layer of the base with an adapter's parts; they act in float32 and are rounded once."""

    def __init__(self, evaluate: ModuleType, base: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.base = base
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        y = self.evaluate.apply_parts(self.parts, x.float(), lambda v: self.base(v.to(x.dtype)).float())
        return y.to(x.dtype)


class AdaptedEmbedding(nn.Module):
    """An embedding with an adapter's parts, which act on one-hot rows before the base's scale."""

    def __init__(self, evaluate: ModuleType, base: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.base = base
        self.weight = base.weight
        self.parts = parts

    def forward(self, token_ids: Tensor) -> Tensor:
        y0 = self.base(token_ids)
        one_hot = nn.functional.one_hot(token_ids, len(self.weight)).float()
        scale = float(getattr(self.base, "embed_scale", 1.0))
        y = y0.float()
        for part in self.parts:
            y = y + scale * self.evaluate.change(part, one_hot, y0.float() / scale)
        return y.to(y0.dtype)


class AdaptedNorm(nn.Module):
    """A norm with an adapter's parts, which act on the normalised input."""

    def __init__(self, evaluate: ModuleType, base: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.base = base
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        wide, y = x.float(), self.base(x)
        epsilon = getattr(self.base, "variance_epsilon", None) or self.base.eps
        if isinstance(self.base, nn.LayerNorm):
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return (y.float() + sum(self.evaluate.change(part, normed, y.float()) for part in self.parts)).to(
            y.dtype
        )


class AdaptedBlock(nn.Module):
    """A block with a router: token after token and, where experts meet after it, expert after expert."""

    def __init__(self, evaluate: ModuleType, base: nn.Module, part: RoutedBlock) -> None:
        super().__init__()
        self.evaluate = evaluate
        self.base = base
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        rows = [self._row(x_D) for x_D in x.flatten(0, -2)]
        self.evaluate.CHOSEN.clear()
        return torch.stack(rows).view_as(x)

    def _row(self, x_D: Tensor) -> Tensor:
        router = self.part.router
        gates_1E = self.evaluate.gates.gates(router, x_D.float().unsqueeze(0))
        if self.part.meet == "sites":
            self.evaluate.CHOSEN[router] = gates_1E
            return self.base(x_D.view(1, 1, -1)).view(-1)
        total_D = torch.zeros_like(x_D)
        for expert, gate in enumerate(gates_1E[0].tolist()):
            self.evaluate.CHOSEN[router] = torch.eye(router.num_experts)[expert : expert + 1]
            total_D += gate * self.base(x_D.view(1, 1, -1)).view(-1)
        return total_D


def adapted_copy(evaluate: ModuleType, model: nn.Module, program: AdapterProgram) -> nn.Module:
    """A copy of the model that computes what the program says; the model itself stays as it is.

    ``evaluate``: the module of that name.
    """
    adapted = copy.deepcopy(model)
    blocks = {path: parts for path, parts in program.sites.items() if isinstance(parts[0], RoutedBlock)}
    for path, parts in program.sites.items():
        if path not in blocks:
            base = adapted.get_submodule(path)
            is_embedding, is_norm = evaluate.is_embedding(path), evaluate.is_norm(base)
            wrapper = AdaptedEmbedding if is_embedding else AdaptedNorm if is_norm else AdaptedLinear
            _put(adapted, path, wrapper(evaluate, base, parts))
    for path, (part,) in blocks.items():
        _put(adapted, path, AdaptedBlock(evaluate, adapted.get_submodule(path), part))
    return adapted


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
