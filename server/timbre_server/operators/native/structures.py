"""C structures that kernels read: who holds their addresses holds what lies there, too.

Legend: I in, O out, R ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

from torch import Tensor

from timbre_server.native.formats import format_of

Fields = tuple[int, ...]
"""Of a C structure, all of which have 64 bits; structures in it and addresses are fields like others."""


def structures(each: Sequence[Fields]) -> array[int]:
    """A C array of them, which costs less than an object of ctypes for each."""
    return array("q", chain.from_iterable(each))


def address_of(structures: array[int]) -> int:
    return structures.buffer_info()[0]


def numbers_fields(tensor: Tensor) -> Fields:
    """``Numbers`` of ``lanes.h``."""
    return tensor.data_ptr(), format_of(tensor)


def low_rank_fields(a_RI: Tensor, b_RO: Tensor) -> Fields:
    """``LowRank`` of ``low_rank.h``."""
    return *numbers_fields(a_RI), *numbers_fields(b_RO), a_RI.shape[0]


def addresses_of(structures: array[int], count: int) -> Sequence[int]:
    """Of each of so many structures."""
    first = address_of(structures)
    return [first + n * (len(structures) // count) * structures.itemsize for n in range(count)]
