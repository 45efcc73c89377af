"""``W x + b`` in C++ (``linear.cpp``), for weights that are laid out in panels, on a CPU.

Few rows are what serving asks for, and there a product is bound by reading W as much as by arithmetic. The
kernel does both at once, where oneDNN and MKL do one after the other, and most models have weights that
bfloat16 holds exactly: of these it reads half. A row gets the same bits whatever rows are beside it.

Legend: T rows, I in, O out, P panels of `PANEL` outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_server.native.formats import format_of
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads

PANEL = 16
"""Of ``linear.cpp``."""


def serves(dtype: torch.dtype) -> bool:
    """Whether it is known to be fast: of float32, on a processor of the kind that it was measured on."""
    return dtype is torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX2"


def in_panels(weight_OI: Tensor) -> partial[Tensor]:
    """``x_TI, b_O -> y_TO`` with a copy of a float32 weight, in half of its bytes where bfloat16 holds its
    values. Raises: LibraryUnavailable."""
    num_out, num_in = weight_OI.shape
    padded_OI = pad(weight_OI.contiguous(), (0, num_in % 2, 0, -num_out % PANEL))
    pairs_POI2 = padded_OI.view(-1, PANEL, padded_OI.shape[1] // 2, 2)
    narrow_POI2 = pairs_POI2.bfloat16()
    if torch.equal(narrow_POI2.float(), pairs_POI2):
        panels = narrow_POI2.transpose(1, 2).contiguous()  # [P, I / 2, PANEL, 2]
    else:
        panels = pairs_POI2.permute(0, 2, 3, 1).contiguous()  # [P, I, PANEL]
    run = kernel("timbre_linear", ADDRESS, NUMBER, NUMBER, ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER)
    return partial(_product, run=run, panels=panels, num_out=num_out, num_in=num_in)


def _product(
    x_TI: Tensor,
    bias_O: Tensor | None,
    *,
    run: Callable[..., None],
    panels: Tensor,
    num_out: int,
    num_in: int,
) -> Tensor:
    num_rows = len(x_TI)
    assert num_in == x_TI.shape[1], f"{x_TI.shape[1]} features for a weight of {num_in}"
    assert x_TI.dtype is torch.float32, f"rows of {x_TI.dtype}"
    x_TI, y_TO = x_TI.contiguous(), x_TI.new_empty(num_rows, num_out)
    bias_O = None if bias_O is None else bias_O.contiguous()
    run(
        x_TI.data_ptr(),
        num_rows,
        num_in,
        panels.data_ptr(),
        format_of(panels),
        None if bias_O is None else bias_O.data_ptr(),
        y_TO.data_ptr(),
        num_out,
        num_threads(num_rows * num_in * num_out),
    )
    return y_TO
