"""What ``spectral.cpp`` is told of transforms, and of which coordinates of one add to which of another.

Legend: N coefficients, K frequencies or coordinates, D features, L taps of a filter.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from timbre_methods.program import Places
from timbre_server.operators.native.fourier import Plan
from timbre_server.operators.native.uses import address_of
from timbre_server.operators.transforms import HalfSpectrum, Transform, Wavelets


class LaneTransform:
    """A transform of rows that lie side by side: ``SpectralTransform`` of ``spectrum.h``."""

    def __init__(self, transform: Transform, length: int) -> None:
        self.length, self.coordinates = length, transform.coordinates
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
    ``SpectralPattern``, of ``SpectralSum`` and ``SpectralEntry``, of ``spectral.cpp``."""

    def __init__(self, places: Places, inner: Transform, outer: Transform) -> None:
        # A frequency's real part is followed by its imaginary one.
        reads, writes = inner.reads(places.columns_N), outer.writes(places.rows_N)
        step = reads.index_NE.shape[1]
        column_N, row_N = (own.index_NE[:, 0] // step for own in (reads, writes))
        counts_K = row_N.bincount(minlength=outer.coordinates // step)
        row_K = counts_K.argsort(stable=True)
        self.order_N = row_K.argsort()[row_N].argsort(stable=True)
        """Of the coefficients: that in which they are read."""
        # Half spectra come doubled, and go back times their length.
        scale_N = writes.factor_NE[:, 0] / (2 * places.out_features if isinstance(outer, HalfSpectrum) else 1)
        factor_N = reads.factor_NE[:, 0]
        if step == 2:
            scale_N = scale_N * factor_N  # All frequencies have the same one.
            factor_N = (reads.factor_NE * writes.factor_NE).prod(1).sign()
        scale_K = torch.zeros(len(counts_K))
        scale_K[row_N] = scale_N.float()
        self._sums_K3 = _fields(row_K, counts_K[row_K], scale_K[row_K])
        entries_N3 = _fields(column_N, torch.arange(len(row_N)), factor_N.float())
        self._entries_N3 = entries_N3[self.order_N]
        lies = self._sums_K3.data_ptr(), len(row_K), self._entries_N3.data_ptr(), step == 2
        self._fields = array("q", lies)
        self.address = address_of(self._fields)


def _fields(first_N: Tensor, second_N: Tensor, third_N: Tensor) -> Tensor:
    """Structures of two integers and a float."""
    return torch.stack([first_N.int(), second_N.int(), third_N.view(torch.int32)], 1)
