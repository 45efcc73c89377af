"""``W x + b`` in C++ (``linear.cpp``), for weights that are laid out in panels, on a CPU.

Few rows are what serving asks for, and there a product is bound by reading W as much as by arithmetic. The
kernel does both at once, where oneDNN and MKL do one after the other, and most models have weights that
bfloat16 holds exactly: of these it reads half. Rows of bfloat16 are multiplied by the processor's matrix unit
or its own products of pairs, into float32 sums. A row gets the same bits whatever rows are beside it.

Legend: T rows, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from timbre_server.native.formats import format_of
from timbre_server.native.joining import Joining
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel
from timbre_server.native.panels import in_panels


def serves(dtype: torch.dtype) -> bool:
    """Whether it is known to be fast: on processors of the kinds that it was measured on."""
    if dtype is torch.bfloat16:
        return torch.cpu._is_avx512_bf16_supported()
    return dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


_INPUT, _WEIGHT = (ADDRESS, NUMBER, ROWS, NUMBER), (ADDRESS, NUMBER, ADDRESS)
_TYPES = *_INPUT, *_WEIGHT, ADDRESS, NUMBER, NUMBER
"""Of the kernel's arguments."""


class NativeProduct:
    """``x, b_O -> y`` for x [..., I], all of the weight's type, with a weight in panels: in 16 bits where
    bfloat16 holds its values."""

    def __init__(self, weight_OI: Tensor, place: Callable[[Tensor], Tensor] = lambda panels: panels) -> None:
        """Of a float32 or bfloat16 weight, of which it keeps a copy, where ``place`` puts it.

        Raises: LibraryUnavailable.
        """
        self.num_out, self.num_in = weight_OI.shape
        self.panels = place(in_panels(weight_OI))
        self._dtype = weight_OI.dtype
        self._weight = self.panels.data_ptr(), format_of(self.panels)
        self._run = kernel("timbre_linear", *_TYPES)

    def __call__(
        self,
        x: Tensor,
        bias_O: Tensor | None,
        dtype: torch.dtype | None = None,
        joining: Joining | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """``dtype``: of y, which is rounded once; or y itself, contiguous. ``joining`` adds to it before."""
        run = self._run
        if joining is not None:
            run = partial(kernel(joining.name, ADDRESS, *_TYPES), joining.address)
        *leading, num_in = x.shape
        assert num_in == self.num_in, f"{num_in} features for a weight of {self.num_in}"
        assert x.dtype is self._dtype, f"rows of {x.dtype} for a weight of {self._dtype}"
        x = x.contiguous()
        y = x.new_empty((*leading, self.num_out), dtype=dtype) if y is None else y
        bias_O = None if bias_O is None else bias_O.float().contiguous()
        run(
            x.data_ptr(),
            format_of(x),
            x.numel() // num_in,
            num_in,
            *self._weight,
            None if bias_O is None else bias_O.data_ptr(),
            y.data_ptr(),
            format_of(y),
            self.num_out,
            torch.get_num_threads(),
        )
        return y
