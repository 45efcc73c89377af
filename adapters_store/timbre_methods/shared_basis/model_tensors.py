"""Tensors of a file that no single layer owns: a vector of a group of layers, a basis of a category."""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_methods.contract import Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.site_tensors import FLOATS, check_tensor


def model_tensor(
    tensors: Tensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> Tensor:
    """The tensor of this full name. Raises `InvalidTensors` where it is missing or not as expected."""
    if name not in tensors:
        raise InvalidTensors(f"{name} is missing, expected one of shape {list(shape)}")
    check_tensor(name, tensors[name], shape, dtypes)
    return tensors[name]
