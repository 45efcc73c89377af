"""Activations of a float32 model in C++ (``activation.cpp``), with the product that gated MLPs take of them:

    down(act(gate(x)) ∘ up(x)),    act(v) = v σ(slope v + bend v³)

which is SiLU with a slope of 1, and GELU's usual approximations with others. A module is replaced if it gives
what this gives, which is tried. An MLP is tried with small layers in the places of its own: what it does
beside this shows, whatever its weights are. In 16 bits PyTorch's own are as fast.

Legend: T rows, D features.
"""

from __future__ import annotations

import copy
import ctypes
import math

import torch
from torch import Tensor, nn

from timbre_server.engine.linears import is_linear
from timbre_server.native.library import ADDRESS, NUMBER, LibraryUnavailable, kernel, num_threads

_CURVES = {
    "silu": (1.0, 0.0),
    "gelu by tanh": (math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715),
    "gelu by sigmoid": (1.702, 0.0),
}
"""Slope and bend."""
_DEFINED_IN = ("transformers.activations", "torch.nn.modules.activation")
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_SIZE, _SCALES = 8, (1.0, 50.0)
"""Of the layers and of the rows that an MLP is tried with: with the large ones limits show."""
_TOLERANCE = 1e-5


def fuse_activations(model: nn.Module) -> None:
    """Replace what can be, in place; to be called before adapters take the places of linear layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _gated_mlp(child) or _activation(child)
            if fused is not None:
                setattr(parent, name, fused)


class Activation(nn.Module):
    """One activation, in the place of the base's own, which still serves rows of other types."""

    def __init__(self, base: nn.Module, slope: float, bend: float) -> None:
        """Raises: LibraryUnavailable."""
        super().__init__()
        self.base = base
        self._curve = slope, bend
        types = (ADDRESS, ADDRESS, ctypes.c_float, ctypes.c_float, ADDRESS, NUMBER)
        self._kernel = kernel("timbre_activation", *types)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float32:
            y: Tensor = self.base(x)
            return y
        x = x.contiguous()
        return self._run(x, None, torch.empty_like(x))

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """``act(x) ∘ factor``, which may be written to x."""
        if not x.dtype is factor.dtype is torch.float32 or x.shape != factor.shape:
            y: Tensor = self(x) * factor
            return y
        x = x.contiguous()
        return self._run(x, factor.contiguous(), x)

    def _run(self, x: Tensor, factor: Tensor | None, y: Tensor) -> Tensor:
        factors, count = None if factor is None else factor.data_ptr(), x.numel()
        self._kernel(x.data_ptr(), factors, *self._curve, y.data_ptr(), count, num_threads(count))
        return y


class GatedMLP(nn.Module):
    """``down(act(gate(x)) ∘ up(x))``, of the base's own layers under their own names."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def __init__(self, base: nn.Module, activation: Activation) -> None:
        super().__init__()
        for name in _LINEARS:
            setattr(self, name, base.get_submodule(name))
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        y: Tensor = self.down_proj(self.act_fn.times(gate, up))
        return y


@torch.inference_mode()
def _activation(module: nn.Module) -> Activation | None:
    """In the place of what depends on nothing but its input."""
    if type(module).__module__ not in _DEFINED_IN or any(True for _ in module.parameters()):
        return None
    x_D = torch.linspace(-10, 10, 1001)
    try:
        found = [Activation(module, *curve) for curve in _CURVES.values()]
    except LibraryUnavailable:
        return None
    return next((activation for activation in found if _agree(activation, module, x_D)), None)


@torch.inference_mode()
def _gated_mlp(module: nn.Module) -> GatedMLP | None:
    children = dict(module.named_children())
    if children.keys() != {*_LINEARS, "act_fn"} or any(True for _ in module.parameters(recurse=False)):
        return None
    activation = _activation(children["act_fn"])
    if activation is None or not all(is_linear(children[name]) for name in _LINEARS):
        return None
    tried = copy.copy(module)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        tried._modules = {name: nn.Linear(_SIZE, _SIZE) for name in _LINEARS} | {"act_fn": activation.base}
        x_1TD = torch.randn(1, 4, _SIZE)
    fused = GatedMLP(tried, activation)
    agree = all(_agree(fused, tried, x_1TD * scale) for scale in _SCALES)
    return GatedMLP(module, activation) if agree else None


def _agree(fused: nn.Module, module: nn.Module, x: Tensor) -> bool:
    """A module that does not run like this agrees with nothing."""
    try:
        want = module(x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return isinstance(want, Tensor) and torch.allclose(fused(x), want, rtol=_TOLERANCE, atol=_TOLERANCE)
