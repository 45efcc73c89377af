"""`SlicedEllpack`: how it is made of `Sparse`, and read as it; in plain PyTorch it runs as `Sparse`.

Legend: T rows of the batch, I in, O out, C outputs of a slice, S slices, K steps of all slices, N entries.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from timbre_methods.program import Sparse, owned_tensors
from timbre_methods.sliced_ellpack import OUTPUTS, SlicedEllpack
from timbre_server.native.formats import narrowed
from timbre_server.native.library import ADDRESS, NUMBER, is_loaded, kernel
from timbre_server.operators.read_as import ReadAsOperator
from timbre_server.operators.sparse import SparseOperator

MAX_NUMBER = (1 << 16) - 1
_DTYPES = torch.int64, torch.int32, torch.float32
"""Of `Sparse`."""


class SlicedEllpackOperator(ReadAsOperator[SlicedEllpack]):
    part = SlicedEllpack

    def __init__(self) -> None:
        super().__init__(SparseOperator(), unsliced)


def sliced(part: Sparse, rounded_to: torch.dtype | None = None) -> Sparse | SlicedEllpack:
    """The very same part where numbers of 16 bits cannot say where entries are, or where it would take more
    memory. ``rounded_to``: as of `narrowed`."""
    if max(part.row_ends.numel(), part.in_features) > MAX_NUMBER:
        return part
    found = slices_of(part, rounded_to)
    before, after = (sum(tensor.nbytes for tensor in owned_tensors(each)) for each in (part, found))
    return found if after <= before else part


def slices_of(part: Sparse, rounded_to: torch.dtype | None = None) -> SlicedEllpack:
    """Of a part that has less than 2^16 outputs, inputs and entries of one output."""
    numbers = part.row_ends, part.columns_N, part.values_N
    are_read = all(each.is_cpu and each.is_contiguous() for each in numbers)
    if are_read and tuple(each.dtype for each in numbers) == _DTYPES and is_loaded():
        return _slices_by_kernel(part, rounded_to)
    return plain_slices_of(part, rounded_to)


def _slices_by_kernel(part: Sparse, rounded_to: torch.dtype | None) -> SlicedEllpack:
    """By ``slices.cpp``."""
    row_ends, columns_N, values_N = part.row_ends, part.columns_N, part.values_N
    out_features, count = row_ends.numel() - 1, columns_N.numel()
    ranks_O = torch.empty(out_features, dtype=torch.int16)
    lengths_S = torch.empty(-(-out_features // OUTPUTS), dtype=torch.int16)
    ends, ranks, lengths = row_ends.data_ptr(), ranks_O.data_ptr(), lengths_S.data_ptr()
    found = array("q", [0])
    make_ranks, make_entries = _kernels()
    make_ranks(ends, out_features, count, ranks, lengths, found.buffer_info()[0], 1)
    if found[0] < 0 or values_N.numel() != count:
        raise ValueError(f"{count} entries do not lie in {out_features} rows as their ends say")
    columns_KC = torch.empty(found[0], OUTPUTS, dtype=torch.int16)
    values_KC = torch.empty(found[0], OUTPUTS)
    make_entries(
        *(ends, columns_N.data_ptr(), values_N.data_ptr(), out_features, part.in_features, ranks, lengths),
        *(columns_KC.data_ptr(), values_KC.data_ptr(), found.buffer_info()[0], 1),
    )
    if found[0]:
        raise ValueError(f"a column is not in [0, {part.in_features})")
    return SlicedEllpack(ranks_O, lengths_S, columns_KC, narrowed(values_KC, rounded_to), part.in_features)


@cache
def _kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    ranks = kernel("timbre_slice_ranks", ADDRESS, NUMBER, NUMBER, *[ADDRESS] * 3)
    entries = kernel("timbre_slice_entries", *[ADDRESS] * 3, NUMBER, NUMBER, *[ADDRESS] * 5)
    return ranks, entries


def plain_slices_of(part: Sparse, rounded_to: torch.dtype | None = None) -> SlicedEllpack:
    """`slices_of`, in plain PyTorch."""
    counts_O = part.row_ends.diff()
    order_O = counts_O.argsort(descending=True, stable=True)
    ranks_O = torch.empty_like(order_O)
    ranks_O[order_O] = torch.arange(len(order_O))
    lengths_S = counts_O[order_O[::OUTPUTS]]
    places_N = _places(ranks_O, lengths_S, part.row_ends)
    shape = int(lengths_S.sum()), OUTPUTS
    columns_KC, values_KC = part.columns_N.new_full(shape, -1), part.values_N.new_zeros(shape)
    columns_KC.view(-1).scatter_(0, places_N, part.columns_N)
    values_KC.view(-1).scatter_(0, places_N, part.values_N)
    # Where an output has no more entries, its column is that of the slice's first one: x is read there.
    columns_KC = torch.where(columns_KC < 0, columns_KC[:, :1], columns_KC)
    ranks, lengths, columns = (numbers.to(torch.int16) for numbers in (ranks_O, lengths_S, columns_KC))
    return SlicedEllpack(ranks, lengths, columns, narrowed(values_KC, rounded_to), part.in_features)


def unsliced(part: SlicedEllpack) -> Sparse:
    """The same matrix; outputs have zeros among their entries."""
    ranks_O, lengths_S, columns_KC = map(_unsigned, (part.ranks_O, part.lengths_S, part.columns_KC))
    counts_O = lengths_S[ranks_O // OUTPUTS]
    row_ends = torch.cat([counts_O.new_zeros(1), counts_O.cumsum(0)])
    places_N = _places(ranks_O, lengths_S, row_ends)
    columns_N, values_N = columns_KC.flatten()[places_N], part.values_KC.flatten()[places_N]
    return Sparse(row_ends, columns_N.to(torch.int32), values_N.float(), part.in_features)


def _places(ranks_O: Tensor, lengths_S: Tensor, row_ends: Tensor) -> Tensor:
    """Where among all slices' entries those are that CSR has in order of outputs."""
    starts_S = OUTPUTS * (lengths_S.cumsum(0) - lengths_S)
    firsts_O = starts_S[ranks_O // OUTPUTS] + ranks_O % OUTPUTS - OUTPUTS * row_ends[:-1]
    firsts_N = torch.repeat_interleave(firsts_O, row_ends.diff())
    return firsts_N + OUTPUTS * torch.arange(len(firsts_N))


def _unsigned(numbers: Tensor) -> Tensor:
    return numbers.long() & MAX_NUMBER
