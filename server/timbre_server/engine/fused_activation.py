"""Activations as one call (`layer_kernels`), with the product that gated MLPs take of them:

    down(act(gate(x)) ∘ up(x)),    act(v) = v σ(slope v + bend v³)

which is SiLU with a slope of 1, and GELU's usual approximations with others. A module is replaced if it gives
what this gives, which is tried in each type that the kernels serve: in float32 curves differ that are one in
16 bits. An MLP is tried with small layers in the places of its own: what it does beside this shows, whatever
its weights are.

Legend: T rows, D features.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from timbre_server.engine.layer_kernels import Curve, LayerKernels
from timbre_server.engine.linears import is_linear

_CURVES: dict[str, Curve] = {
    "silu": (1.0, 0.0),
    "gelu by tanh": (math.sqrt(8 / math.pi), math.sqrt(8 / math.pi) * 0.044715),
    "gelu by sigmoid": (1.702, 0.0),
}
_DEFINED_IN = ("transformers.activations", "torch.nn.modules.activation")
_LINEARS = ("gate_proj", "up_proj", "down_proj")
_REFUSALS: tuple[type[Exception], ...] = (AttributeError, RuntimeError, TypeError)
"""What a module raises that does not run like this."""
_SIZE, _SCALES = 8, (1.0, 50.0)
"""Of the layers and of the rows that an MLP is tried with: with the large ones limits show."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}
"""Relative to a number, and to what numbers are on average. In 16 bits transformers rounds after each
operation of a curve, and the call once."""


def fuse_activations(model: nn.Module, kernels: LayerKernels) -> None:
    """Replace what can be, in place; to be called before adapters take the places of linear layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _gated_mlp(child, kernels) or _activation(child, kernels)
            if fused is not None:
                setattr(parent, name, fused)


class Activation(nn.Module):
    """One activation, in the place of the base's own, which still serves rows of other types."""

    def __init__(self, base: nn.Module, curve: Curve, kernels: LayerKernels) -> None:
        super().__init__()
        self.base = base
        self._curve = curve
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in self._kernels.dtypes:
            found: Tensor = self.base(x)
            return found
        x = x.contiguous()
        y = torch.empty_like(x)
        self._kernels.activate(x, None, self._curve, y)
        return y

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """``act(x) ∘ factor``, which may be written to x."""
        is_known = x.dtype is factor.dtype and x.dtype in self._kernels.dtypes
        if not is_known or x.shape != factor.shape:
            y: Tensor = self(x) * factor
            return y
        x = x.contiguous()
        self._kernels.activate(x, factor.contiguous(), self._curve, x)
        return x


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
def _activation(module: nn.Module, kernels: LayerKernels) -> Activation | None:
    """In the place of what depends on nothing but its input."""
    if type(module).__module__ not in _DEFINED_IN or any(True for _ in module.parameters()):
        return None
    found = (Activation(module, curve, kernels) for curve in _CURVES.values())
    return next((activation for activation in found if _is_right(activation, kernels)), None)


def _is_right(activation: Activation, kernels: LayerKernels) -> bool:
    base = activation.base
    for dtype in kernels.dtypes:
        x_D, factor_D = torch.linspace(-10, 10, 1001), torch.linspace(11, -9, 1001)
        x_D, factor_D = x_D.to(kernels.device, dtype), factor_D.to(kernels.device, dtype)
        if not _agree(activation, base, kernels, x_D):
            return False
        if not _agree(activation.times, lambda x, factor: base(x) * factor, kernels, x_D, factor_D):
            return False
    return True


@torch.inference_mode()
def _gated_mlp(module: nn.Module, kernels: LayerKernels) -> GatedMLP | None:
    children = dict(module.named_children())
    if children.keys() != {*_LINEARS, "act_fn"} or any(True for _ in module.parameters(recurse=False)):
        return None
    activation = _activation(children["act_fn"], kernels)
    if activation is None or not all(is_linear(children[name]) for name in _LINEARS):
        return None
    tried = copy.copy(module)
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(0)
        tried._modules = {name: nn.Linear(_SIZE, _SIZE).to(kernels.device) for name in _LINEARS}
        tried._modules["act_fn"] = activation.base
        x_1TD = torch.randn(1, 4, _SIZE).to(kernels.device)
    fused = GatedMLP(tried, activation)
    agree = all(_agree(fused, tried, kernels, x_1TD * scale) for scale in _SCALES)
    return GatedMLP(module, activation) if agree else None


def _agree(
    fused: Callable[..., Tensor],
    module: Callable[..., object],
    kernels: LayerKernels,
    x: Tensor,
    *more: Tensor,
) -> bool:
    """What does not run agrees with nothing; ``x`` may be written to."""
    try:
        want = module(x, *more)
        got = fused(x, *more)
    except _REFUSALS + kernels.failures:
        return False
    if not isinstance(want, Tensor) or (got.shape, got.dtype) != (want.shape, want.dtype):
        return False
    tolerance = _TOLERANCES[x.dtype]
    return torch.allclose(got, want, rtol=tolerance, atol=tolerance * float(want.abs().mean()))
