"""The kernels of ``spectral.cpp``, for one table after another.

Legend: T rows of the batch, U rows that use a transform, I in, O out, N coefficients, C coordinates of a
spectrum, G groups of rows, L rows side by side.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.native.notes import current
from timbre_server.operators.native.bound_kernels import BoundKernels, Sources
from timbre_server.operators.native.fourier import most_lanes
from timbre_server.operators.native.lanes import Batch
from timbre_server.operators.native.spectral_patterns import LaneTransform, Pattern
from timbre_server.operators.native.structures import Fields, address_of, structures


@dataclass(frozen=True, slots=True, eq=False)
class Core:
    """``SpectralCore`` of ``spectral.cpp``, and what it has the addresses of."""

    fields: Fields = (0, 0, 0, 0, 0)
    held: object = None

    @staticmethod
    def of_all(pattern: Pattern, values: Tensor) -> Core:
        """``values``: [N] where all rows have the same mix, or [N, L]."""
        return Core((pattern.address, values.data_ptr(), values.dim() == 1, 0, 0), (pattern, values))

    @staticmethod
    def of_each(uses: Sequence[Fields], held: object) -> Core:
        """``uses``: ``SpectralUse`` of ``spectral.cpp``, in the order of lanes; ``held``: what they have the
        addresses of."""
        own = structures(uses)
        return Core((0, 0, 0, address_of(own), len(uses)), (own, held))


@lru_cache(maxsize=256)
def weight_bits(weight: float) -> int:
    """A double as an integer of 64 bits."""
    return int(struct.unpack("q", struct.pack("d", weight))[0])


class _Member:
    """The `Kernel` of one member of a group of layers, for the table that is shown."""

    def __init__(self, inner: LaneTransform, outer: LaneTransform) -> None:
        self._inner, self._outer = inner, outer
        self._fields = array("q", bytes(8 * 6))
        self._address = address_of(self._fields)
        self._held: object = None
        self._run = kernel("timbre_spectral", ADDRESS, ADDRESS, ADDRESS)
        self.rows_N = torch.empty(0, dtype=torch.int64)
        self.out_features = outer.length

    def show(self, batch: Batch, cores: Sequence[Core], num_values: int) -> None:
        """``cores``: of each kind of groups in the batch."""
        own = structures([cores[kind].fields for kind in batch.kind_of])
        is_small = num_threads(batch.num_rows * (2 * num_values + 8 * self._outer.length)) == 1
        lies = self._outer.address, batch.address, address_of(own)
        self._fields[:] = array("q", [*lies, len(batch.groups), is_small, self._inner.coordinates])
        self._held, self.rows_N = (batch, cores, own), batch.rows_U

    def clear(self) -> None:
        self._fields[3], self._held = 0, None

    def add(self, z_GCL: Tensor, y_TO: Tensor) -> None:
        """What was made of x is all that it reads: the spectra of the batch's groups of rows."""
        self._run(self._address, z_GCL.data_ptr(), y_TO.data_ptr(), torch.get_num_threads())


class BoundSpectral(BoundKernels):
    """For one table after another, at the same members."""

    def __init__(self, inner: LaneTransform, outer: Sequence[LaneTransform | None], sources: Sources) -> None:
        """``outer``: of each member; None where nothing is added."""
        self._inner, self._sources = inner, sources
        self._own = {n: _Member(inner, own) for n, own in enumerate(outer) if own is not None}
        super().__init__([self._own.get(member) for member in range(len(outer))])
        self._fields = array("q", bytes(8 * 4))
        self._address = address_of(self._fields)
        self._num_groups = 0
        self._held: object = None
        self._run = kernel("timbre_spectra", ADDRESS, ADDRESS, NUMBER, ADDRESS)

    def show(self, batch: Batch, cores: Mapping[int, Sequence[Core]], num_values: int) -> None:
        """The rows of a table, and what of `_Member.show` each member has."""
        self._num_groups, self._held = len(batch.groups), batch
        is_small = num_threads(batch.num_rows * 8 * self._inner.length) == 1
        self._fields[:] = array("q", [self._inner.address, batch.address, self._num_groups, is_small])
        for member, own in self._own.items():
            own.show(batch, cores[member], num_values)

    def clear(self) -> None:
        """Hold nothing of a table, and do nothing, until the next is shown."""
        self._num_groups = self._fields[2] = 0
        self._held = None
        for own in self._own.values():
            own.clear()

    def source(self, x_TI: Tensor) -> Tensor:
        """Where it is written down, with room for the groups of all tables: a row has one at most."""
        is_narrow = x_TI.dtype is torch.bfloat16
        x_TI = x_TI if is_narrow else x_TI.float()
        num_groups = self._num_groups if current() is None else x_TI.numel() // self._inner.length
        z_GCL = self._sources.empty(num_groups, self._inner.coordinates, most_lanes())
        self._run(self._address, x_TI.data_ptr(), is_narrow, z_GCL.data_ptr(), torch.get_num_threads())
        return z_GCL
