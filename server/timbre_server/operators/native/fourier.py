"""What `fourier.h` is told of a transform's length, and of the rows that it takes side by side."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

LANES = 8
FACTORS = (4, 2, 3, 5, 7)
"""Those that it knows, in the order in which a length is divided by them."""


class Rows(ctypes.Structure):
    """``SpectralRows`` of ``spectral.cpp``."""

    _fields_ = [("rows", ctypes.c_int64 * LANES), ("count", ctypes.c_int64)]

    @staticmethod
    def of(rows: Sequence[int]) -> Rows:
        return Rows((ctypes.c_int64 * LANES)(*rows), len(rows))


def factors_of(length: int) -> list[int] | None:
    """Of half a length; None where it is odd, or has a factor that is not known."""
    left, found = length // 2, []
    for factor in FACTORS:
        while left % factor == 0 and left > 1:
            found.append(factor)
            left //= factor
    return found if left == 1 and length % 2 == 0 else None


class _View(ctypes.Structure):
    """``FourierPlan`` of ``fourier.h``."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("num_factors", ctypes.c_int64),
        ("factors", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("half_roots", ctypes.c_void_p),
    ]


class Plan:
    """The transform of one length, whose factors are known."""

    def __init__(self, length: int) -> None:
        factors = factors_of(length)
        assert factors is not None, f"there is no plan for a transform of {length} numbers"
        m = length // 2
        self.length = length
        self.coordinates = 2 * (m + 1)
        self._held = torch.tensor(factors), _roots(m, m), _roots(length, m + 1)
        self._view = _View(m, len(factors), *(tensor.data_ptr() for tensor in self._held))
        self.address = ctypes.addressof(self._view)


def _roots(turn: int, count: int) -> Tensor:
    """[count, 2]: exp(-2πi k / turn), float32."""
    angles = torch.arange(count, dtype=torch.float64) * (-2 * math.pi / turn)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float()
