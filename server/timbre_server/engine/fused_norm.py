"""A norm as one call, where transformers' modules are eight: on a GPU PyTorch's own `rms_norm`, on a CPU
``norm.cpp``, since `rms_norm` is no faster there.

In 16 bits a module rounds twice, after it has normalised and after it has multiplied by its weight, and
these once. Where they differ by more than that (a weight of 1 + w, a mean that is taken out) the module
itself goes on, and so it does for rows of another type than its weight.

Legend: T rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from timbre_server.native.library import ADDRESS, NUMBER, REAL, ROWS, LibraryUnavailable, kernel

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What modules call the number that is added to the mean square."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_SCALES = (1.0, 1e-3)
"""Of the rows that are tried: with the small ones epsilon shows."""
_NATIVE = {torch.float32: "timbre_norm_float32", torch.bfloat16: "timbre_norm_bfloat16"}

Norm = Callable[[Tensor], Tensor]


def norm_of(module: nn.Module, *, native: bool = False) -> Norm:
    """The fastest way to a norm's output, on the device where its weight is.

    ``native``: C++ may be used on a CPU.
    """
    weight_D, epsilon = module.weight, _epsilon_of(module)
    assert isinstance(weight_D, Tensor)
    if epsilon is None or weight_D.dtype not in _TOLERANCES:
        return module
    fused: Norm | None = None
    if weight_D.is_cuda:
        fused = _in_pytorch(weight_D, epsilon)
    elif native and weight_D.device.type == "cpu":
        fused = _in_cpp(weight_D, epsilon)
    return module if fused is None else _checked(fused, module, weight_D)


def _epsilon_of(module: nn.Module) -> float | None:
    found = next((value for name in _EPSILONS if (value := getattr(module, name, None)) is not None), None)
    return found if isinstance(found, float) else None


def _in_pytorch(weight_D: Tensor, epsilon: float) -> Norm:
    return lambda x: rms_norm(x, weight_D.shape, weight_D, epsilon)


def _in_cpp(weight_D: Tensor, epsilon: float) -> Norm | None:
    """None where there is no C++ for the weight."""
    name = _NATIVE.get(weight_D.dtype)
    if name is None or not weight_D.is_contiguous():
        return None
    try:
        run = kernel(name, ADDRESS, ADDRESS, REAL, ADDRESS, ROWS, NUMBER)
    except LibraryUnavailable:
        return None
    num_features = len(weight_D)

    def norm(x: Tensor) -> Tensor:
        x = x.contiguous()
        y, rows = torch.empty_like(x), x.numel() // num_features
        own = x.data_ptr(), weight_D.data_ptr(), epsilon, y.data_ptr()
        run(*own, rows, num_features, torch.get_num_threads())
        return y

    return norm


@torch.inference_mode()
def _checked(fused: Norm, module: nn.Module, weight_D: Tensor) -> Norm:
    """``fused`` for rows of the weight's type, if it gives what the module gives; else the module."""
    tolerance = _TOLERANCES[weight_D.dtype]
    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        x_TD = torch.randn(4, len(weight_D), generator=generator).to(weight_D) * scale
        if not torch.allclose(fused(x_TD), module(x_TD), rtol=tolerance, atol=tolerance * 1e-2):
            return module

    def norm(x: Tensor) -> Tensor:
        if x.dtype is not weight_D.dtype:
            y: Tensor = module(x)
            return y
        return fused(x)

    return norm
