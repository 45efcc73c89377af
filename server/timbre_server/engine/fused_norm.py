"""A norm as one launch on a GPU, where transformers' modules are eight: by PyTorch's own `rms_norm`.

In 16 bits a module rounds twice, after it has normalised and after it has multiplied by its weight, and
`rms_norm` once. Where the two differ by more than that (a weight of 1 + w, a mean that is taken out) the
module itself goes on, and so it does for rows of another type than its weight. On a CPU `rms_norm` is no
faster.

Legend: T rows, D features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""What modules call the number that is added to the mean square."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_SCALES = (1.0, 1e-3)
"""Of the rows that are tried: with the small ones epsilon shows."""


def norm_of(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The fastest way to a norm's output, on the device where its weight is."""
    weight_D = module.weight
    assert isinstance(weight_D, Tensor)
    return _fused(module, weight_D) or module if weight_D.is_cuda else module


@torch.inference_mode()
def _fused(module: nn.Module, weight_D: Tensor) -> Callable[[Tensor], Tensor] | None:
    """`rms_norm` as the module would have it; None where it gives something else."""
    epsilon = next((value for name in _EPSILONS if (value := getattr(module, name, None)) is not None), None)
    tolerance = _TOLERANCES.get(weight_D.dtype)
    if not isinstance(epsilon, float) or tolerance is None:
        return None

    def fused(x: Tensor) -> Tensor:
        if x.dtype is not weight_D.dtype:
            y: Tensor = module(x)
            return y
        return rms_norm(x, weight_D.shape, weight_D, epsilon)

    generator = torch.Generator().manual_seed(0)
    for scale in _SCALES:
        x_TD = torch.randn(4, len(weight_D), generator=generator).to(weight_D) * scale
        if not torch.allclose(fused(x_TD), module(x_TD), rtol=tolerance, atol=tolerance * 1e-2):
            return None
    return fused
