"""Linear layers on a CPU with the weight laid out once for the matrix unit, instead of at every call.

oneDNN's packed products are reached through operators that are private to torch, so they are tried out
when a `LinearPacker` is made: where they are missing, refuse, or compute something else than `F.linear`,
nothing is packed and everything works as before. A packed weight is a second copy, one for all layers that
share it; the module's own weight is neither freed nor written, since it may be tied to the embedding and
adapters may read it. A merged weight is packed for itself, and both go with its product.

Legend: T rows, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from timbre_server.engine.linears import bias_of, weight_of

_BATCH_HINT = 16
"""One layout serves every number of rows; this hint was the fastest over all of them."""
_PLAIN_ROWS_FLOAT32 = 2
"""Up to so many rows the plain float32 weight is faster than the packed one."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


class LinearPacker:
    """Packs linear layers of one dtype, where this machine can."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self.works = device.type == "cpu" and dtype in _TOLERANCE and _computes_linear(dtype)
        """Whether anything will be packed."""
        self._plain_rows = _PLAIN_ROWS_FLOAT32 if dtype is torch.float32 else 0
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}
        """By where a weight lies: it, so that the place stays its own, and its packed copy."""

    def takes(self, module: nn.Module) -> bool:
        """Whether a module computes ``W x + b`` with a weight of the dtype and on the device, and no more."""
        if type(module) not in (nn.Linear, Conv1D):
            return False
        weight = weight_of(module)
        return weight.dtype is self._dtype and weight.device.type == self._device.type

    def pack(self, module: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """``x -> W x + b`` of the module on a packed copy of its weight. None: use the module itself."""
        if not self.works or not self.takes(module):
            return None
        weight = weight_of(module)
        place = weight.data_ptr()
        if place not in self._packed:
            self._packed[place] = weight, _reordered(weight.detach())
        return PackedLinear(module, self._packed[place][1], bias_of(module), self._plain_rows)

    def product_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """`pack`, or the module itself."""
        return self.pack(module) or module

    def product_with(self, weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
        """``x -> W x + b`` of a weight that belongs to no module, in this dtype; nothing but it keeps it."""
        plain = partial(linear, weight=weight_OI, bias=bias_O)
        if not self.works:
            return plain
        return PackedLinear(plain, _reordered(weight_OI), bias_O, self._plain_rows)

    def bytes_with(self, weight_OI: Tensor) -> int:
        """What the weights in `product_with` take, the packed one included."""
        return weight_OI.nbytes * (2 if self.works else 1)


class PackedLinear:
    """The product with one packed weight; ``plain`` is the same product, for up to ``plain_rows`` rows."""

    def __init__(
        self, plain: Callable[[Tensor], Tensor], packed: Tensor, bias_O: Tensor | None, plain_rows: int
    ) -> None:
        self._plain = plain
        self._packed = packed
        self._bias_O = bias_O
        self._plain_rows = plain_rows

    def __call__(self, x: Tensor) -> Tensor:
        x_TI = x.flatten(0, -2)
        if x_TI.shape[0] <= self._plain_rows or x_TI.shape[0] == 0:
            return self._plain(x)
        return _product(x_TI, self._packed, self._bias_O).view(*x.shape[:-1], -1)


def _reordered(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _BATCH_HINT)
    return packed


def _product(x_TI: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, packed, bias_O, "none", [], "")
    return y_TO


def _computes_linear(dtype: torch.dtype) -> bool:
    """Try the operators on small products of several row counts, with and without bias."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(40, 24, generator=generator).to(dtype)
    bias_O = torch.randn(40, generator=generator).to(dtype)
    try:
        with torch.inference_mode():
            packed = _reordered(weight_OI)
            for num_rows in (1, 3, 16, 65):
                x_TI = torch.randn(num_rows, 24, generator=generator).to(dtype)
                for bias in (None, bias_O):
                    want_TO = linear(x_TI.float(), weight_OI.float(), None if bias is None else bias.float())
                    got_TO = _product(x_TI, packed, bias)
                    if got_TO.shape != want_TO.shape or got_TO.dtype is not dtype:
                        return False
                    if not torch.allclose(
                        got_TO.float(), want_TO, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]
                    ):
                        return False
    except (AttributeError, RuntimeError):
        return False
    return True
