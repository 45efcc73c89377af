"""Kernels that add by themselves what the adapters at a group of layers do, from its input.

Legend: T rows of the batch, N some of them, I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from timbre_server.native.arena import Arena
from timbre_server.native.notes import current
from timbre_server.native.rounding import widen_into
from timbre_server.operators.contract import Adds, Bound, Change


class Kernel(Protocol):
    """One member's parts of all adapters, ready to be added."""

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        """The rows that it adds to, each once."""
        ...

    def add(self, source: Any, y_TO: Tensor) -> None:
        """Add to y, in place, what the parts make of x, or of what was made of x for all members; y is
        float32, and tensors are contiguous."""
        ...

    @property
    def out_features(self) -> int: ...


class KernelChange(Change):
    """A change that is computed where it is added, and never lies anywhere else."""

    __slots__ = ("_kernel", "_num_rows", "_source")
    _kernel: Kernel
    _num_rows: int
    _source: Any

    def __init__(self, kernel: Kernel, source: Any, num_rows: int) -> None:
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


class BoundKernels(Bound):
    """Of the members of a group; None: nobody has parts there."""

    def __init__(self, members: Sequence[Kernel | None]) -> None:
        self._members = members

    @property
    def takes_any_type(self) -> bool:
        return True

    @property
    def outlasts_tables(self) -> bool:
        return True

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        source = self.source(x_TI.contiguous())
        return [
            () if member is None else (KernelChange(member, source, len(x_TI)),) for member in self._members
        ]

    def adds(self, member: int) -> Adds:
        own = self._members[member]
        return Adds(sums=None if own is None else own.add)


class Sources:
    """Memory for what is made of an input for all members, and read before another group's is made."""

    def __init__(self) -> None:
        self._arena = Arena()

    def empty(self, *shape: int) -> Tensor:
        """Float32; for what is written down, where it will be free each time."""
        return torch.empty(shape) if current() is None else self._arena.empty(*shape)

    def wide(self, x_TI: Tensor) -> Tensor:
        """A contiguous x in float32."""
        return x_TI if x_TI.dtype is torch.float32 else widen_into(self.empty(*x_TI.shape), x_TI)
