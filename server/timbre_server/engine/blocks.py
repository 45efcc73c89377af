"""Which modules of the base a mixture of experts may choose for: blocks, found by what they do.

A block has linear layers in it and no attention, is called once a forward with one tensor of rows and
nothing else, and gives back one of the same shape. What lies within a block is none of its own.

Legend: T rows, D features.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from timbre_server.adapters.groups import Block
from timbre_server.engine.linears import is_linear
from timbre_server.engine.messages import SiteShape


class BlockCalls:
    """The calls of all modules that may be blocks, in the order in which they ended. Keeps the tensors: only
    the living can be told apart."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, Tensor | None, Tensor | None]] = []
        self._outputs: list[tuple[str, Tensor]] = []
        """Of linear layers."""

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Notes what a forward of the model calls, until the hooks are removed."""
        hooks: list[RemovableHandle] = []
        for path, module in model.named_modules():
            if is_linear(module):
                hooks.append(module.register_forward_hook(partial(self._note_output, path)))
            elif path and any(is_linear(below) for below in module.modules()):
                hooks.append(module.register_forward_hook(partial(self._note_call, path), with_kwargs=True))
        return hooks

    def _note_output(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs.append((path, output))

    def _note_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        is_plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        y = output if isinstance(output, Tensor) else None
        self._calls.append((path, args[0] if is_plain else None, y))

    def blocks(self, num_rows: int, attention: Collection[str]) -> tuple[Block, ...]:
        """Those that saw each of the rows once. ``attention``: the paths of attention layers."""
        times = [path for path, _, _ in self._calls]
        found = [
            Block(path, x.shape[-1], next((last for last, out in self._outputs if out is y), None))
            for path, x, y in self._calls
            if x is not None
            and y is not None
            and x.shape == y.shape == (1, num_rows, x.shape[-1])
            and times.count(path) == 1
            and not any(_is_within(layer, path) for layer in attention)
        ]
        return tuple(
            block
            for block in found
            if not any(_is_within(block.path, outer.path) for outer in found if outer is not block)
        )


def _is_within(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def block_shape(block: Block) -> SiteShape:
    return SiteShape(block.path, block.features, block.features, has_bias=False, kind="block")
