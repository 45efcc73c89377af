"""The activation functions that a PEANUT config may name: every key that PEFT accepts, as it computes them.

Each is a fixed function: where the public layer has parameters (``prelu``, ``xielu``) it is made anew for
every forward, so they keep their first values, those of ``xielu`` being rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

Activation = Callable[[Tensor], Tensor]


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _laplace(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _xielu(x: Tensor) -> Tensor:
    alpha, beta, eps = 0.80078125, 0.5, -9.98377799987793e-07
    negative = torch.expm1(x.clamp(max=eps)) - x
    return beta * x + alpha * torch.where(x > 0, x * x, negative)


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_10": lambda x: functional.gelu(x).clamp(-10, 10),
        "gelu_accurate": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu_new": _gelu_tanh,
        "gelu_python": functional.gelu,
        "gelu_python_tanh": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "hardswish": functional.hardswish,
        "laplace": _laplace,
        "leaky_relu": lambda x: functional.leaky_relu(x, 0.01),
        "linear": lambda x: x,
        "mish": functional.mish,
        "prelu": lambda x: functional.leaky_relu(x, 0.25),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": torch.relu,
        "relu2": lambda x: torch.relu(x).square(),
        "relu6": functional.relu6,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "sqrtsoftplus": lambda x: functional.softplus(x).sqrt(),
        "swish": functional.silu,
        "tanh": torch.tanh,
        "xielu": _xielu,
    }
)
