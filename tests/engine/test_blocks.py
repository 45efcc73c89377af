"""Which modules a router may choose for, by what they are called with and give back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timbre_server.adapters.groups import Block
from timbre_server.engine.blocks import BlockCalls

NUM_ROWS, SIZE = 5, 6


class Mlp(nn.Module):
    """Ends in its last layer, or in a product with a number."""

    def __init__(self, scale: float | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.scale = scale

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Tensor:
        y: Tensor = self.down(self.up(x).relu())
        return y if self.scale is None else y * self.scale


class Nested(nn.Module):
    """A block with another in it, as experts that are shared stand beside others."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(SIZE, SIZE), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.own(x) + self.shared(x)
        return y


class Layer(nn.Module):
    """Everything a layer may call, once but for ``twice``."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.scaled, self.nested = Mlp(), Mlp(0.5), Nested()
        self.twice, self.given_more, self.attention = Mlp(), Mlp(), Mlp()
        self.fewer_rows, self.wider = Mlp(), nn.Sequential(nn.Linear(SIZE, 2 * SIZE))

    def forward(self, x: Tensor) -> Tensor:
        x = self.nested(self.scaled(self.plain(x)))
        x = self.attention(self.given_more(self.twice(self.twice(x)), extra=x))
        self.fewer_rows(x[:, :2])
        y: Tensor = self.wider(x)
        return y


def test_a_block_keeps_the_shape_of_the_one_tensor_that_it_is_given_once_and_lies_in_no_other() -> None:
    model = nn.ModuleDict({"layer": Layer()})
    calls = BlockCalls()
    hooks = calls.watch(model)
    model["layer"](torch.randn(1, NUM_ROWS, SIZE))

    found = calls.blocks(NUM_ROWS, {"layer.attention"})

    assert found == (
        Block("layer.plain", SIZE, "layer.plain.down"),
        Block("layer.scaled", SIZE),
        Block("layer.nested", SIZE),
    )
    for hook in hooks:
        hook.remove()
