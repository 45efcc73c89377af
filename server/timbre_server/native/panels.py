"""How a weight lies for ``linear.cpp``: the rows of a panel side by side, pair of columns by pair.

Legend: O out, I in, P panels of outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_server.native.library import library


def panel_size() -> int:
    """Outputs of a panel. Raises: LibraryUnavailable."""
    return int(library().timbre_linear_panel())


def in_panels(weight_OI: Tensor, *, is_rounded: bool = False) -> Tensor:
    """A copy: bfloat16 [P, I / 2, panel, 2] of a weight whose values that holds, or which is rounded to it;
    else float32 [P, I, panel]. Zeros fill the last panel and the last pair. Raises: LibraryUnavailable."""
    num_out, num_in = weight_OI.shape
    panel = panel_size()
    padded_OI = pad(weight_OI.contiguous(), (0, num_in % 2, 0, -num_out % panel))
    pairs_POI2 = padded_OI.view(-1, panel, padded_OI.shape[1] // 2, 2)
    narrow_POI2 = pairs_POI2.bfloat16()
    if is_rounded or weight_OI.dtype is torch.bfloat16 or torch.equal(narrow_POI2.float(), pairs_POI2):
        return narrow_POI2.transpose(1, 2).contiguous()
    return pairs_POI2.permute(0, 2, 3, 1).contiguous()


def out_of_panels(panels: Tensor, num_out: int, num_in: int) -> Tensor:
    """float32 [O, I] of panels of bfloat16."""
    padded_OI = panels.float().transpose(1, 2).flatten(0, 1).flatten(1)
    return padded_OI[:num_out, :num_in].contiguous()


def packed_bytes(num_out: int, num_in: int) -> int:
    """Of panels of bfloat16. Raises: LibraryUnavailable."""
    return 2 * (num_out + -num_out % panel_size()) * (num_in + num_in % 2)
