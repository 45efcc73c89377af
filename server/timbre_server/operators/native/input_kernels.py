"""Operators whose parts a kernel applies to x itself, each where it lies.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from timbre_server.native.formats import format_of
from timbre_server.native.joining import Joining
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel
from timbre_server.operators.contract import Adds, Bound, Members, PartT, Standing, StandingOperator
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import BoundKernels, Sources
from timbre_server.operators.native.prepared import Prepared, PreparedParts
from timbre_server.operators.native.uses import Uses
from timbre_server.operators.row_table import RowTable


class InputKernel:
    """The `Kernel` of one member that reads x itself: ``run(uses, x, T, I, y, O, threads)``; where it reads
    bfloat16, too, ``run(uses, x, format, T, I, y, O, threads)``."""

    def __init__(self, name: str, out_features: int, rows: LiveRows, *, reads_bfloat16: bool) -> None:
        told = (NUMBER,) if reads_bfloat16 else ()
        self._run = kernel(name, ADDRESS, ADDRESS, *told, ROWS, NUMBER, ADDRESS, NUMBER)
        self._reads_bfloat16 = reads_bfloat16
        self.out_features = out_features
        self.uses = Uses(rows)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.uses.rows_N

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        told = (format_of(source),) if self._reads_bfloat16 else ()
        in_features = source.shape[-1]
        x = source.data_ptr(), *told, source.numel() // in_features, in_features
        threads = torch.get_num_threads()
        self._run(self.uses.address, *x, y_TO.data_ptr(), self.out_features, threads)


class BoundInputKernels(BoundKernels, Standing[PreparedParts]):
    """`InputKernel`s of one name."""

    def __init__(
        self,
        name: str,
        rows: LiveRows,
        sources: Sources,
        *,
        reads_bfloat16: bool = False,
        joining: str | None = None,
    ) -> None:
        """``reads_bfloat16``: as it is, not in float32 alone. ``joining``: the kernel that computes the base
        product, too."""
        self._kernels: list[InputKernel | None] = []
        super().__init__(self._kernels)
        self._name, self._rows, self._sources = name, rows, sources
        self._reads_bfloat16, self._joining = reads_bfloat16, joining

    def admit(self, slot: int, prepared: PreparedParts) -> None:
        self._kernels += [None] * (prepared.num_members - len(self._kernels))
        for member, parts in prepared.members.items():
            own = self._kernels[member]
            if own is None:
                own = InputKernel(self._name, parts.shape[0], self._rows, reads_bfloat16=self._reads_bfloat16)
                self._kernels[member] = own
            own.uses.admit(slot, parts)

    def dismiss(self, slot: int) -> None:
        for own in self._kernels:
            if own is not None:
                own.uses.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        self._rows.show(table)
        return self

    def adds(self, member: int) -> Adds:
        own = self._kernels[member]
        if own is None or self._joining is None:
            return super().adds(member)
        return Adds(sums=own.add, joining=Joining(self._joining, own.uses.address))

    def source(self, x_TI: Tensor) -> Tensor:
        is_read = self._reads_bfloat16 and x_TI.dtype is torch.bfloat16
        return x_TI if is_read else self._sources.wide(x_TI)


class InputKernelOperator(StandingOperator[PartT, PreparedParts]):
    """One of a kernel as `BoundInputKernels` takes it."""

    kernel: ClassVar[str]
    reads_bfloat16: ClassVar[bool] = False
    joining: ClassVar[str | None] = None

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    @abstractmethod
    def prepared_part(self, part: PartT) -> Prepared | None:
        """None: it changes nothing."""

    def prepared(self, members: Members[PartT]) -> PreparedParts:
        each = [[self.prepared_part(part) for part in own] for own in members]
        return PreparedParts([[part for part in own if part is not None] for own in each])

    def standing(self, rows: LiveRows) -> Standing[PreparedParts]:
        return BoundInputKernels(
            self.kernel, rows, self._sources, reads_bfloat16=self.reads_bfloat16, joining=self.joining
        )
