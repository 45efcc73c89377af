"""What every operator in C++ shares: whose rows a kernel is called for, and changes that it adds by itself.

Kernels read tensors where they lie: whoever holds addresses holds the tensors, too.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Bound, Change
from timbre_server.operators.formats import format_of
from timbre_server.operators.row_table import Segment


class Rows(ctypes.Structure):
    """``Rows`` of ``lanes.h``."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("count", ctypes.c_int64),
    ]

    @staticmethod
    def of(segment: Segment) -> Rows:
        """Weights are read at each run: a router may have written them anew."""
        return Rows(segment.rows_N.data_ptr(), segment.weights_N.data_ptr(), segment.rows_N.shape[0])


class Numbers(ctypes.Structure):
    """``Numbers`` of ``lanes.h``."""

    _fields_ = [("first", ctypes.c_void_p), ("format", ctypes.c_int64)]

    @staticmethod
    def of(tensor: Tensor) -> Numbers:
        return Numbers(tensor.data_ptr(), format_of(tensor))


class LowRankUse(ctypes.Structure):
    """``LowRankUse`` of ``low_rank.cpp``."""

    _fields_ = [
        ("a", Numbers),
        ("b", Numbers),
        ("rank", ctypes.c_int64),
        ("rows", Rows),
    ]

    @staticmethod
    def of(a_RI: Tensor, b_OR: Tensor, segment: Segment) -> LowRankUse:
        return LowRankUse(Numbers.of(a_RI), Numbers.of(b_OR), a_RI.shape[0], Rows.of(segment))


class Kernel(Protocol):
    """One member's parts of all adapters, ready to be added."""

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        """The rows that it adds to, each once."""
        ...

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        """Add to y, in place, what the parts make of x, or of what was made of x for all members; both are
        float32 and contiguous."""
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
    """The `Kernel` of one member that reads x itself: ``run(uses, their number, x, I, y, O, threads)``."""

    def __init__(
        self,
        name: str,
        uses: Sequence[ctypes.Structure],
        held: Sequence[tuple[Segment, object]],
        shape: tuple[int, int],
        work: int,
    ) -> None:
        """``held``: whose rows and whose numbers ``uses`` has the addresses of. ``shape`` is [O, I]."""
        self._run = kernel(name, ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS, NUMBER)
        self._held, self._work = tuple(held), work
        self._uses = (type(uses[0]) * len(uses))(*uses)
        self._first, self._count = ctypes.addressof(self._uses), len(uses)
        self.out_features, self._in_features = shape

    @cached_property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of([segment for segment, _ in self._held])

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        self._run(
            self._first,
            self._count,
            source.data_ptr(),
            self._in_features,
            y_TO.data_ptr(),
            self.out_features,
            num_threads(self._work),
        )


class BoundInputKernels(Bound):
    """Of the members of a group; None: nobody has parts there."""

    def __init__(self, members: Sequence[InputKernel | None]) -> None:
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        return [
            () if member is None else (KernelChange(member, x_TI, len(x_TI)),) for member in self._members
        ]


def rows_of(segments: Sequence[Segment]) -> Tensor:
    """Those of any of them, each once."""
    return torch.tensor(sorted({row for segment in segments for row in segment.rows_N.tolist()}))
