"""``W x + b`` in C++ (``linear.cpp``), for weights that are laid out in panels, on a CPU.

Few rows are what serving asks for, and there a product is bound by reading W as much as by arithmetic. The
kernel does both at once, where oneDNN and MKL do one after the other: 16 rows took half of their time, and
none up to 512 more than it, on a processor with AVX2. A row gets the same bits whatever rows are beside it.

Legend: T rows, I in, O out, P panels of `PANEL` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads

PANEL = 16
"""Of ``linear.cpp``."""


def serves(dtype: torch.dtype) -> bool:
    """Whether it is known to be fast: of float32, on a processor of the kind that it was measured on."""
    return dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def in_panels(weight_OI: Tensor) -> Callable[[Tensor, Tensor | None], Tensor]:
    """``x_TI, b_O -> y_TO`` with a copy of a float32 weight. Raises: LibraryUnavailable."""
    num_out = weight_OI.shape[0]
    padded_OI = pad(weight_OI.contiguous(), (0, 0, 0, -num_out % PANEL))
    panels_PIO = padded_OI.view(-1, PANEL, padded_OI.shape[1]).transpose(1, 2).contiguous()
    run = kernel("timbre_linear", ADDRESS, NUMBER, NUMBER, ADDRESS, ADDRESS, ADDRESS, NUMBER)
    return partial(_product, run, panels_PIO, num_out)


def _product(
    run: Callable[..., None], panels_PIO: Tensor, num_out: int, x_TI: Tensor, bias_O: Tensor | None
) -> Tensor:
    num_rows, num_in = x_TI.shape
    assert num_in == panels_PIO.shape[1], f"{num_in} features for a weight of {panels_PIO.shape[1]}"
    assert x_TI.dtype is torch.float32, f"rows of {x_TI.dtype}"
    x_TI, y_TO = x_TI.contiguous(), x_TI.new_empty(num_rows, num_out)
    bias_O = None if bias_O is None else bias_O.contiguous()
    run(
        x_TI.data_ptr(),
        num_rows,
        num_in,
        panels_PIO.data_ptr(),
        None if bias_O is None else bias_O.data_ptr(),
        y_TO.data_ptr(),
        num_out,
        num_threads(num_rows * num_in * num_out),
    )
    return y_TO
