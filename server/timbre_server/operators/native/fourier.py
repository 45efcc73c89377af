"""What `fourier.h` is told of a transform's length, and of the rows that it takes side by side."""

from __future__ import annotations

import ctypes
import math
from functools import cache

import torch
from torch import Tensor

from timbre_server.native.library import library

NARROW = 8
"""Rows in the narrowest register."""
MOST_ROWS = 16
MOST_FACTOR = 256
"""Of a length. A pass takes as many steps for each number, and with larger ones PyTorch is faster."""
FIRST_FACTORS = (3, 2, 5, 7, 1)
"""Of the pass that is one with what turns a half spectrum into numbers, in the order of preference."""


def most_lanes() -> int:
    """Rows in the widest register."""
    return int(library().timbre_spectral_rows())


@cache
def factors_of(length: int) -> list[int] | None:
    """Of half a length, or of an odd one; None where it has a prime factor that is too large."""
    half = length if length % 2 else length // 2
    first = 1 if length % 2 else next(factor for factor in FIRST_FACTORS if half % factor == 0)
    primes = _primes_of(half // first)
    # Eights, but as many fours as leave no two.
    count = primes.count(2)
    fours = -count % 3 if count > 1 else 0
    eights, twos = divmod(count - 2 * fours, 3)
    found = [first, *[8] * eights, *primes[count:], *[4] * fours, *[2] * twos]
    return found if primes[-1:] <= [MOST_FACTOR] else None


def _primes_of(number: int) -> list[int]:
    """In order, each as often as it divides."""
    found, prime = [], 2
    while prime * prime <= number:
        if number % prime:
            prime += 1
        else:
            found.append(prime)
            number //= prime
    return [*found, number] if number > 1 else found


class _View(ctypes.Structure):
    """``FourierPlan`` of ``fourier.h``."""

    _fields_ = [
        ("m", ctypes.c_int64),
        ("num_factors", ctypes.c_int64),
        ("factors", ctypes.c_void_p),
        ("roots", ctypes.c_void_p),
        ("half_roots", ctypes.c_void_p),
        ("is_odd", ctypes.c_int64),
    ]


class Plan:
    """The transform of one length, whose factors are known."""

    def __init__(self, length: int) -> None:
        factors = factors_of(length)
        assert factors is not None, f"there is no plan for a transform of {length} numbers"
        m = length if length % 2 else length // 2
        self.length = length
        self.coordinates = 2 * (length // 2 + 1)
        self._held = torch.tensor(factors), _roots(m, m), _roots(length, m + 1)
        self._view = _View(m, len(factors), *(tensor.data_ptr() for tensor in self._held), length % 2)
        self.address = ctypes.addressof(self._view)


def _roots(turn: int, count: int) -> Tensor:
    """[count, 2]: exp(-2πi k / turn), float32; what is zero is so exactly."""
    angles = torch.arange(count, dtype=torch.float64) * (-2 * math.pi / turn)
    return torch.stack([angles.cos(), angles.sin()], dim=1).round(decimals=15).float()
