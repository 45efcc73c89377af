"""How a weight lies for ``linear.cpp``: the rows of a panel side by side, pair of columns by pair; for a
matrix unit those of one vector of rows after another, some pairs at a time.

Legend: O out, I in, P panels of outputs, V vectors of a panel, W outputs of a vector, G groups of pairs of
columns, N pairs of a group.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from timbre_server.native.library import library


@cache
def _sizes() -> tuple[int, int, int]:
    """V, W and N. Raises: LibraryUnavailable."""
    panel, vector = int(library().timbre_linear_panel()), int(library().timbre_linear_vector())
    return panel // vector, vector, int(library().timbre_linear_together())


def in_panels(weight_OI: Tensor, *, is_rounded: bool = False) -> Tensor:
    """A copy: bfloat16 [P, G, V, N, W, 2] of a weight whose values that holds, or which is rounded to it;
    else float32 [P, I, V W]. Zeros fill the last panel and the last columns. Raises: LibraryUnavailable."""
    vectors, vector, together = _sizes()
    narrow_OI = weight_OI.bfloat16()
    if is_rounded or weight_OI.dtype is torch.bfloat16 or torch.equal(narrow_OI.float(), weight_OI):
        padded_OI = _padded(narrow_OI, vectors * vector, 2 * together)
        groups_PVWGN2 = padded_OI.view(-1, vectors, vector, padded_OI.shape[1] // (2 * together), together, 2)
        return groups_PVWGN2.permute(0, 3, 1, 4, 2, 5).contiguous()
    padded_OI = _padded(weight_OI, vectors * vector, 2)
    return padded_OI.view(-1, vectors * vector, padded_OI.shape[1]).transpose(1, 2).contiguous()


def out_of_panels(panels: Tensor, num_out: int, num_in: int) -> Tensor:
    """float32 [O, I] of panels of bfloat16."""
    padded_OI = panels.float().permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
    return padded_OI[:num_out, :num_in].contiguous()


def packed_bytes(num_out: int, num_in: int) -> int:
    """Of panels of bfloat16. Raises: LibraryUnavailable."""
    vectors, vector, together = _sizes()
    return 2 * (num_out + -num_out % (vectors * vector)) * (num_in + -num_in % (2 * together))


def _padded(weight_OI: Tensor, num_out: int, num_in: int) -> Tensor:
    """With zeros up to multiples of both numbers."""
    return pad(weight_OI.contiguous(), (0, -weight_OI.shape[1] % num_in, 0, -weight_OI.shape[0] % num_out))
