"""What every operator in C++ shares: whose rows a kernel is called for, and changes that it adds by itself.

Kernels read tensors where they lie: whoever holds addresses holds the tensors, too.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from timbre_server.native.formats import format_of
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Adds, Bound, Change
from timbre_server.operators.row_table import Segment

Fields = tuple[int, ...]
"""Of a C structure, all of which have 64 bits; structures in it and addresses are fields like others."""


def structures(each: Sequence[Fields]) -> array[int]:
    """A C array of them, which costs less than an object of ctypes for each."""
    return array("q", chain.from_iterable(each))


def address_of(structures: array[int]) -> int:
    return structures.buffer_info()[0]


def rows_fields(segment: Segment) -> Fields:
    """``Rows`` of ``lanes.h``. Weights are read at each run: a router may have written them anew."""
    return segment.rows_N.data_ptr(), segment.weights_N.data_ptr(), segment.rows_N.shape[0]


def numbers_fields(tensor: Tensor) -> Fields:
    """``Numbers`` of ``lanes.h``."""
    return tensor.data_ptr(), format_of(tensor)


def low_rank_fields(a_RI: Tensor, b_RO: Tensor, rows: Fields) -> Fields:
    """``LowRankUse`` of ``low_rank.cpp``."""
    return *numbers_fields(a_RI), *numbers_fields(b_RO), a_RI.shape[0], *rows


class Kernel(Protocol):
    """One member's parts of all adapters, ready to be added."""

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        """The rows that it adds to, each once."""
        ...

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        """Add to y, in place, what the parts make of x, or of what was made of x for all members; y is
        float32, and both are contiguous."""
        ...

    @property
    def out_features(self) -> int: ...


class KernelChange(Change):
    """A change that is computed where it is added, and never lies anywhere else."""

    __slots__ = ("_kernel", "_num_rows", "_source")
    _kernel: Kernel
    _num_rows: int
    _source: Tensor

    def __init__(self, kernel: Kernel, source: Tensor, num_rows: int) -> None:
        object.__setattr__(self, "_kernel", kernel)
        object.__setattr__(self, "_source", source)
        object.__setattr__(self, "_num_rows", num_rows)

    def add_to(self, sum_TO: Tensor) -> None:
        self._kernel.add(self._source, sum_TO)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self._kernel.rows_N

    @property
    def values_NO(self) -> Tensor:  # noqa: N802
        """For who wants to do something else with it."""
        sum_TO = torch.zeros(self._num_rows, self._kernel.out_features)
        self._kernel.add(self._source, sum_TO)
        return sum_TO[self.rows_N]


class InputKernel:
    """The `Kernel` of one member that reads x itself: ``run(uses, their number, x, I, y, O, threads)``, or
    ``run(uses, their number, x, its format, I, y, O, threads)``."""

    def __init__(
        self,
        name: str,
        uses: Sequence[Fields],
        held: Sequence[tuple[Segment, object]],
        shape: tuple[int, int],
        work: int,
        *,
        is_told_format: bool = False,
    ) -> None:
        """``held``: whose rows and whose numbers ``uses`` has the addresses of. ``shape`` is [O, I]."""
        told = (NUMBER,) if is_told_format else ()
        self._run = kernel(name, ADDRESS, NUMBER, ADDRESS, *told, NUMBER, ADDRESS, NUMBER)
        self._is_told_format = is_told_format
        self._held, self._work = tuple(held), work
        self._uses = structures(uses)
        self._first, self._count = address_of(self._uses), len(uses)
        self.out_features, self._in_features = shape

    @cached_property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of([segment for segment, _ in self._held])

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        told = (format_of(source),) if self._is_told_format else ()
        self._run(
            self._first,
            self._count,
            source.data_ptr(),
            *told,
            self._in_features,
            y_TO.data_ptr(),
            self.out_features,
            num_threads(self._work),
        )


class BoundKernels(Bound):
    """Of the members of a group; None: nobody has parts there."""

    def __init__(self, members: Sequence[Kernel | None]) -> None:
        self._members = members

    @property
    def takes_any_type(self) -> bool:
        return True

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        source = self.source(x_TI.contiguous())
        return [
            () if member is None else (KernelChange(member, source, len(x_TI)),) for member in self._members
        ]

    def adds(self, member: int) -> Adds:
        own = self._members[member]
        return Adds(sums=None if own is None else own.add)


def rows_of(segments: Iterable[Segment]) -> Tensor:
    """Those of any of them, each once."""
    return torch.tensor(sorted({row for segment in segments for row in segment.rows_N.tolist()}))
