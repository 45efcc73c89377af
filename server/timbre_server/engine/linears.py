"""What counts as a linear layer of the base model, and how to read its weight.

Anything with in and out features: `nn.Linear`, its subclasses and quantised look-alikes, and
transformers' `Conv1D`, whose weight lies transposed. Embeddings are none.

Legend: I in, O out.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a module for which `is_linear` holds."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def stores_transposed(module: nn.Module) -> bool:
    """Whether the module's own weight lies as [in, out]."""
    return isinstance(module, Conv1D)


def bias_of(module: nn.Module) -> Tensor | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def weight_of(module: nn.Module) -> Tensor:
    """The weight [O, I], as ``y = x W^T + b`` has it: a view of the module's own, never a copy.

    Raises:
        TypeError: the module keeps its weight in a form that is not a dense floating-point matrix.
    """
    in_features, out_features = features(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{type(module).__name__} has no dense floating-point weight matrix.")
    oriented = weight.T if isinstance(module, Conv1D) else weight
    if tuple(oriented.shape) != (out_features, in_features):
        raise TypeError(
            f"{type(module).__name__}'s weight is {tuple(oriented.shape)}, "
            f"expected {(out_features, in_features)}."
        )
    return oriented
