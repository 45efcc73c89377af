"""Tensors of a file that no single layer owns: a vector of a group of layers, a basis of a category."""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_methods.contract import Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.site_tensors import FLOATS


def model_tensor(
    tensors: Tensors, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...] = FLOATS
) -> Tensor:
    """The tensor of this full name. Raises `InvalidTensors` where it is missing or not as expected."""
    tensor = tensors.get(name)
    if tensor is None:
        raise InvalidTensors(f"{name} is missing, expected one of shape {list(shape)}")
    if tuple(tensor.shape) != shape:
        raise InvalidTensors(f"{name}: found shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        found, *wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise InvalidTensors(f"{name}: found dtype {found}, expected one of {', '.join(wanted)}")
    return tensor
