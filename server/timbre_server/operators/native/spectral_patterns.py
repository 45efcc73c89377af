"""What ``spectral.cpp`` is told of transforms, and of which coordinates of one add to which of another.

Legend: N coefficients, F frequencies, E coordinates of one, K frequencies or coordinates that are summed, D
features, L taps of a filter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor

from timbre_methods.program import Places
from timbre_server.native.library import ADDRESS, NUMBER, kernel
from timbre_server.operators.native.fourier import Plan
from timbre_server.operators.native.structures import address_of
from timbre_server.operators.transforms import Entries, HalfSpectrum, Transform, Wavelets


class Frequencies:
    """Where those of a transform are read, or written: of each a ``Frequency`` of ``pattern.cpp``."""

    def __init__(self, entries: Entries, coordinates: int, *, times: float | None) -> None:
        """``times``: of what is written, how often it is there; None of what is read."""
        index_FE, factor_FE = entries
        self.count, step = index_FE.shape
        self.is_complex = step == 2  # A frequency's real part is followed by its imaginary one.
        self.num_places = coordinates // step
        factor_F, size_F = torch.ones(self.count, dtype=torch.float64), factor_FE[:, 0]
        if self.is_complex:
            factor_F = factor_FE.prod(1).sign()
        elif times is None:
            factor_F, size_F = size_F, factor_F
        size_F = size_F if times is None else size_F / times
        fields = index_FE[:, 0] // step, factor_F.view(torch.int64), size_F.view(torch.int64)
        self._fields_F3 = torch.stack(fields, 1)
        self.address = self._fields_F3.data_ptr()


class LaneTransform:
    """A transform of rows that lie side by side: ``SpectralTransform`` of ``spectrum.h``."""

    def __init__(self, transform: Transform, length: int) -> None:
        self.length, self.coordinates = length, transform.coordinates
        every_F = torch.arange(transform.frequencies)
        # Half spectra come doubled, and go back times their length.
        times = 2 * length if isinstance(transform, HalfSpectrum) else 1
        self.read = Frequencies(transform.reads(every_F), self.coordinates, times=None)
        self.written = Frequencies(transform.writes(every_F), self.coordinates, times=times)
        plan, phases_K2, places_D = None, None, None
        filters_L2: tuple[Tensor | None, Tensor | None] = None, None
        if isinstance(transform, HalfSpectrum):
            plan = Plan(length)
            if transform.phase_K is not None:
                phase_K = transform.phase_K.expand(self.coordinates // 2)
                phases_K2 = torch.view_as_real(phase_K.contiguous())
            if transform.place_D is not None:
                places_D = transform.place_D.int()
        else:
            assert isinstance(transform, Wavelets), f"{type(transform).__name__} is not among spectrum.h's"
            filters_L2 = transform.forward_L2.float().contiguous(), transform.back_L2.float().contiguous()
        taps = 0 if filters_L2[0] is None else len(filters_L2[0])
        tensors = phases_K2, places_D, *filters_L2
        self._held = plan, tensors
        addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
        plan_address = 0 if plan is None else plan.address
        self._fields = array("q", [length, self.coordinates, plan_address, *addresses, taps])
        self.address = address_of(self._fields)


class Pattern:
    """Which frequencies (of `dft`) or coordinates of one spectrum coefficients add to which of another:
    ``SpectralPattern``, of ``SpectralSum`` and ``SpectralEntry``, of ``pattern.h``."""

    def __init__(self, places: Places, inner: LaneTransform, outer: LaneTransform) -> None:
        rows_N, columns_N = places.rows_N.contiguous(), places.columns_N.contiguous()
        num_sums, count = outer.written.num_places, len(rows_N)
        self._sums_K3 = torch.empty(num_sums, 3, dtype=torch.int32)
        self._entries_N3 = torch.empty(count, 3, dtype=torch.int32)
        sums, entries, is_wrong = self._sums_K3.data_ptr(), self._entries_N3.data_ptr(), array("q", [0])
        _make_pattern()(
            *(rows_N.data_ptr(), columns_N.data_ptr(), count),
            *(outer.written.address, outer.written.count, inner.read.address, inner.read.count),
            *(num_sums, sums, entries, address_of(is_wrong), 1),
        )
        if is_wrong[0]:
            raise ValueError(f"a frequency is not in [0, {outer.written.count}) or [0, {inner.read.count})")
        self._fields = array("q", [sums, num_sums, entries, outer.written.is_complex])
        self.address = address_of(self._fields)

    @cached_property
    def order_N(self) -> Tensor:  # noqa: N802
        """Of the coefficients: that in which they are read."""
        return self._entries_N3[:, 1].long()


@cache
def _make_pattern() -> Callable[..., None]:
    places, table = (ADDRESS, ADDRESS, NUMBER), (ADDRESS, NUMBER)
    return kernel("timbre_spectral_pattern", *places, *table, *table, NUMBER, *[ADDRESS] * 3)
