"""What every operator in C++ shares: whose rows a kernel is called for, and changes that it adds by itself.

Kernels read tensors where they lie: whoever holds addresses holds the tensors, too.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks.
"""

from __future__ import annotations

from array import array
from bisect import bisect, bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from timbre_server.native.arena import Arena
from timbre_server.native.formats import format_of
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel, least_count
from timbre_server.native.notes import current
from timbre_server.native.rounding import widen_into
from timbre_server.operators.contract import Adds, Bound, Change, Standing
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.row_table import RowTable

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


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A part as a kernel reads it, without the rows that use it."""

    fields: Fields
    shape: tuple[int, int]
    """[O, I], or where it reads some inputs only, O and their number."""
    work: int
    """Multiplications for one row."""
    held: object
    """What ``fields`` has the addresses of."""


class PreparedParts:
    """Those of one adapter at a group of layers."""

    def __init__(self, members: Sequence[Sequence[Prepared]]) -> None:
        self.num_members = len(members)
        each = [part for own in members for part in own]
        own_structures = structures([part.fields for part in each])
        addresses = iter(addresses_of(own_structures, len(each)))
        held = own_structures, tuple(part.held for part in each)
        self.members = {
            member: MemberParts(
                tuple(next(addresses) for _ in own), own[0].shape, sum(part.work for part in own), held
            )
            for member, own in enumerate(members)
            if own
        }
        """Of those that have any."""


@dataclass(frozen=True, slots=True, eq=False)
class MemberParts:
    """An adapter's parts at one member."""

    addresses: Sequence[int]
    shape: tuple[int, int]
    work: int
    held: object
    """All that lies at the addresses."""


class Uses:
    """Who uses which parts of one member, in the order of slots: ``Uses`` of ``lanes.h``, with the addresses
    of each part and of its adapter's rows."""

    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows
        self._slots: list[int] = []
        self._held: dict[int, MemberParts] = {}
        self._uses = array("q")
        self._work = 0
        self._fields = array("q", [0, 0, 0])
        self.address = address_of(self._fields)
        """Where it stays."""

    def admit(self, slot: int, parts: MemberParts) -> None:
        self._held[slot], self._work = parts, max(self._work, parts.work)
        place, rows = bisect(self._slots, slot), self._rows.address(slot)
        self._slots[place:place] = [slot] * len(parts.addresses)
        self._uses[2 * place : 2 * place] = array("q", [n for part in parts.addresses for n in (part, rows)])
        self._tell()

    def dismiss(self, slot: int) -> None:
        """Nothing where it has no parts here."""
        self._held.pop(slot, None)
        first, end = bisect_left(self._slots, slot), bisect(self._slots, slot)
        del self._slots[first:end], self._uses[2 * first : 2 * end]
        self._tell()

    def _tell(self) -> None:
        self._fields[:] = array("q", [address_of(self._uses), len(self._slots), least_count(self._work)])

    @property
    def slots(self) -> Collection[int]:
        """Whose parts these are, as they come and go."""
        return self._held.keys()

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        """As `Kernel.rows_N`."""
        return self._rows.rows_of(self._slots)


class InputKernel:
    """The `Kernel` of one member that reads x itself: ``run(uses, x, T, I, y, O, threads)``, where it is told
    x's format ``run(uses, x, format, T, I, y, O, threads)``."""

    def __init__(self, name: str, shape: tuple[int, int], rows: LiveRows, *, is_told_format: bool) -> None:
        """``shape``: [O, I]."""
        told = (NUMBER,) if is_told_format else ()
        self._run = kernel(name, ADDRESS, ADDRESS, *told, ROWS, NUMBER, ADDRESS, NUMBER)
        self._is_told_format = is_told_format
        self.out_features = shape[0]
        self.uses = Uses(rows)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.uses.rows_N

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        told = (format_of(source),) if self._is_told_format else ()
        in_features = source.shape[-1]
        x = source.data_ptr(), *told, source.numel() // in_features, in_features
        threads = torch.get_num_threads()
        self._run(self.uses.address, *x, y_TO.data_ptr(), self.out_features, threads)


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


class BoundInputKernels(BoundKernels, Standing[PreparedParts]):
    """`InputKernel`s of one name."""

    def __init__(self, name: str, rows: LiveRows, sources: Sources, *, is_told_format: bool = False) -> None:
        self._kernels: list[InputKernel | None] = []
        super().__init__(self._kernels)
        self._rows, self._sources = rows, sources
        self._kernel_of = partial(InputKernel, name, rows=rows, is_told_format=is_told_format)

    @property
    def outlasts_tables(self) -> bool:
        return True

    def source(self, x_TI: Tensor) -> Tensor:
        return self._sources.wide(x_TI)

    def admit(self, slot: int, prepared: PreparedParts) -> None:
        self._kernels += [None] * (prepared.num_members - len(self._kernels))
        for member, parts in prepared.members.items():
            own = self._kernels[member] or self._kernel_of(parts.shape)
            own.uses.admit(slot, parts)
            self._kernels[member] = own

    def dismiss(self, slot: int) -> None:
        for own in self._kernels:
            if own is not None:
                own.uses.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        self._rows.show(table)
        return self
