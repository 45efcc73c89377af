"""Linear layers on a CPU with the weight laid out once for the fastest product, instead of at every call.

There are two layouts: that of our own kernel (`native_linear`), and oneDNN's, which is reached through
operators that are private to torch. So a layout is tried out when a `LinearPacker` is made:
where it is missing, refuses, or computes something else than `F.linear`, the next is taken; without any
nothing is packed and everything works as before. A packed weight is a second copy, one for all layers that
share it; the module's own weight is neither freed nor written, since it may be tied to the embedding and
adapters may read it. A merged weight is packed for itself, and both go with its product.

Legend: T rows, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from timbre_server.engine.linears import bias_of, weight_of
from timbre_server.engine.native_linear import NativeProduct, serves
from timbre_server.native.huge_pages import HugePages
from timbre_server.native.joining import Joining
from timbre_server.native.library import LibraryUnavailable

_BATCH_HINT = 16
"""One layout of oneDNN's serves every number of rows; this hint was the fastest over all of them."""
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


Place = Callable[[Tensor], Tensor]


class BiasedProduct(Protocol):
    """``x, b_O -> W x + b`` of a weight that it holds, for x [..., I]; y is of x's type or of another."""

    def __call__(self, x: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Layout:
    pack: Callable[[Tensor, Place], BiasedProduct]
    """Of a weight [O, I], and of what puts its copy where it shall lie."""
    plain_rows: int
    """Up to so many rows the weight as it is is faster."""


class LinearPacker:
    """Packs linear layers of one dtype, where this machine can."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, native: bool = False) -> None:
        """``native``: C++ may be used."""
        self._dtype = dtype
        self._device = device
        is_tried = device.type == "cpu" and dtype in _TOLERANCE
        self._pages = HugePages()
        known = _layouts(dtype, native=native) if is_tried else iter(())
        self._layout = next((layout for layout in known if _computes_linear(layout, dtype)), None)
        self._packed: dict[tuple[object, ...], tuple[Tensor, BiasedProduct]] = {}
        """By where and how a weight lies: it, so that the place stays its own, and its packed product."""

    @property
    def works(self) -> bool:
        """Whether anything will be packed."""
        return self._layout is not None

    @property
    def means(self) -> str:
        """By what it multiplies, for people."""
        if self._layout is None:
            return "PyTorch"
        return "C++" if self._layout.pack is NativeProduct else "oneDNN"

    def takes(self, module: nn.Module) -> bool:
        """Whether a module computes ``W x + b`` with a weight of the dtype and on the device, and no more."""
        if type(module) not in (nn.Linear, Conv1D):
            return False
        weight = weight_of(module)
        return weight.dtype is self._dtype and weight.device.type == self._device.type

    def pack(self, module: nn.Module) -> PackedLinear | None:
        """``x -> W x + b`` of the module on a packed copy of its weight. None: use the module itself."""
        if self._layout is None or not self.takes(module):
            return None
        weight = weight_of(module)
        place = weight.data_ptr(), weight.shape, weight.stride()
        if place not in self._packed:
            self._packed[place] = weight, self._layout.pack(weight.detach(), self._pages.copied)
        return PackedLinear(module, self._packed[place][1], bias_of(module), self._layout.plain_rows)

    def product_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """`pack`, or the module itself."""
        return self.pack(module) or module

    def product_with(self, weight_OI: Tensor, bias_O: Tensor | None) -> Callable[[Tensor], Tensor]:
        """``x -> W x + b`` of a weight that belongs to no module, in this dtype; nothing but it keeps it."""
        plain = partial(linear, weight=weight_OI, bias=bias_O)
        if self._layout is None:
            return plain
        return PackedLinear(plain, self._layout.pack(weight_OI, _as_it_is), bias_O, self._layout.plain_rows)

    def bytes_with(self, weight_OI: Tensor) -> int:
        """What the weights in `product_with` take, the packed one included."""
        return weight_OI.nbytes * (2 if self.works else 1)


class PackedLinear:
    """The product with one packed weight; ``plain`` is the same product, for up to ``plain_rows`` rows."""

    def __init__(
        self,
        plain: Callable[[Tensor], Tensor],
        product: BiasedProduct,
        bias_O: Tensor | None,
        plain_rows: int,
    ) -> None:
        self._plain = plain
        self._product = product
        self._bias_O = bias_O
        if bias_O is not None and isinstance(product, NativeProduct):
            self._bias_O = bias_O.float().contiguous()  # Once: tapes are told where it lies.
        self._plain_rows = plain_rows

    def __call__(self, x: Tensor) -> Tensor:
        return self._rounded_to(x.dtype, x)

    def in_float32(self, x: Tensor) -> Tensor:
        return self._rounded_to(torch.float32, x)

    def joined(self, x: Tensor, joining: Joining, y: Tensor | None = None) -> Tensor | None:
        """With what it adds, in y where there is one; None: only our own kernel can."""
        if not isinstance(self._product, NativeProduct) or x.numel() == 0:
            return None
        return self._product(x, self._bias_O, joining=joining, y=y)

    def _rounded_to(self, dtype: torch.dtype, x: Tensor) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        if num_rows <= self._plain_rows or num_rows == 0:
            return self._plain(x).to(dtype)
        return self._product(x, self._bias_O, dtype)


def _layouts(dtype: torch.dtype, *, native: bool) -> Iterator[Layout]:
    """The fastest first."""
    if native and serves(dtype):
        yield Layout(NativeProduct, plain_rows=0)
    yield Layout(_reordered, plain_rows=2 if dtype is torch.float32 else 0)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _reordered(weight_OI: Tensor, _: Place) -> BiasedProduct:
    """By oneDNN, which keeps its copy itself."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _BATCH_HINT)

    def product(x: Tensor, bias_O: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias_O, "none", [], "")
        return y.to(dtype)

    return product


def _computes_linear(layout: Layout, dtype: torch.dtype) -> bool:
    """Try it on small products of several row counts, with and without bias."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(40, 24, generator=generator).to(dtype)
    bias_O = torch.randn(40, generator=generator).to(dtype)
    try:
        with torch.inference_mode():
            product = layout.pack(weight_OI, _as_it_is)
            for num_rows in (1, 3, 16, 65):
                x_TI = torch.randn(num_rows, 24, generator=generator).to(dtype)
                for bias in (None, bias_O):
                    want_TO = linear(x_TI.float(), weight_OI.float(), None if bias is None else bias.float())
                    got_TO = product(x_TI, bias)
                    if got_TO.shape != want_TO.shape or got_TO.dtype is not dtype:
                        return False
                    if not torch.allclose(
                        got_TO.float(), want_TO, rtol=_TOLERANCE[dtype], atol=_TOLERANCE[dtype]
                    ):
                        return False
    except (AttributeError, RuntimeError, LibraryUnavailable):
        return False
    return True
