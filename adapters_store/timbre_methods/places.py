"""Places that a file names only by a seed, drawn again bit for bit and shared between adapters.

Legend: N stored coefficients, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Hashable
from threading import RLock
from typing import Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from timbre_methods.bases import MAX_GRID
from timbre_methods.errors import InvalidConfig
from timbre_methods.program import Places

DRAWN_FROM_THE_FRONT = (2**32 - 1) // 20
"""Below this size `torch.randperm` settles one place after the other, from the first on."""

CELLS_A_STEP = 16
"""A step in Python takes about as long as torch needs for so many cells."""

_IN_USE: WeakValueDictionary[Hashable, Places] = WeakValueDictionary()
_LOCK = RLock()


class Draw(NamedTuple):
    """What random places in a layer's [O, I] follow from."""

    seed: int
    out_features: int
    in_features: int
    num_places: int


def fourier_places(
    seed: int, out_features: int, in_features: int, count: int, device: torch.device
) -> Places:
    """The places of FourierFT, in the spectrum [O, I]; see `drawn_places`."""
    return drawn_places(Draw(seed, out_features, in_features, count), "dft", (), device)


def drawn_places(
    draw: Draw, transform: Literal["dft", "dwt"], low_pass: tuple[float, ...], device: torch.device
) -> Places:
    """Places from a seed, in the spectrum of ``dft`` or around the centre of a wavelet's coefficients.

    Always on the CPU; on the meta device nothing is drawn. Adapters of equal draw and transform get the very
    same object while anybody has it. Safe to call from any thread. Raises as `drawn_cells`.
    """
    key = draw, transform, low_pass, device.type == "meta"
    with _LOCK:
        places = _IN_USE.get(key)
        if places is None:
            places = _IN_USE[key] = _places(draw, transform, low_pass, device)
        return places


def drawn_cells(draw: Draw, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns of the first ``count`` of ``torch.randperm(out * in)`` from a CPU generator, int64 on
    the CPU; on the meta device nothing is drawn.

    Raises `InvalidConfig` where out x in is above `MAX_GRID`.
    """
    size = draw.out_features * draw.in_features
    if size > MAX_GRID:
        raise InvalidConfig(
            f"random places in a layer of {draw.out_features} x {draw.in_features} are not served: "
            f"the draw is limited to {MAX_GRID} cells; leave this layer out"
        )
    if device.type == "meta":
        rows_N = torch.empty(draw.num_places, dtype=torch.int64, device="meta")
        return rows_N, torch.empty_like(rows_N)
    cells_N = first_of_permutation(draw.seed, size, draw.num_places)
    return cells_N // draw.in_features, cells_N % draw.in_features


def first_of_permutation(seed: int, size: int, count: int) -> Tensor:
    """``torch.randperm(size)[:count]`` of a seeded CPU generator, int64. Few of many cost time and memory for
    ``count`` alone."""
    generator = torch.Generator().manual_seed(seed)
    if size >= DRAWN_FROM_THE_FRONT or count * CELLS_A_STEP > size:
        return torch.randperm(size, generator=generator)[:count].clone()
    # Step i of the shuffle swaps place i with place i + draw mod (size - i). Full 64-bit numbers hold two of
    # the generator's draws each, the first in the upper half.
    pairs = torch.empty((count + 1) // 2, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    draws_N = torch.stack([pairs >> 32, pairs], dim=1).flatten()[:count] & 0xFFFFFFFF
    steps_N = torch.arange(count)
    partners = (steps_N + draws_N % (size - steps_N)).tolist()
    moved: dict[int, int] = {}
    cells = []
    for i, j in enumerate(partners):
        cells.append(moved.get(j, j))
        moved[j] = moved.get(i, i)
    return torch.tensor(cells)


def _places(
    draw: Draw, transform: Literal["dft", "dwt"], low_pass: tuple[float, ...], device: torch.device
) -> Places:
    rows_N, columns_N = drawn_cells(draw, device)
    if transform == "dwt":
        rows_N, columns_N = _among_coefficients(draw, len(low_pass), rows_N, columns_N)
    return Places(transform, draw.out_features, draw.in_features, rows_N, columns_N, low_pass)


def _among_coefficients(draw: Draw, taps: int, rows_N: Tensor, columns_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cells as WaveFT means them: at the centre of a grid that is wider by the filter, with the two mixed
    quadrants exchanged. (Its top right quadrant holds what is high along the rows' axis and low along the
    columns', and the product ``Tᵀ S T`` wants that at the bottom left.)"""
    margin = taps - 2
    half_out, half_in = ((n + margin + 1) // 2 for n in (draw.out_features, draw.in_features))
    rows_N, columns_N = rows_N + margin // 2, columns_N + margin // 2
    is_low_N, is_left_N = rows_N < half_out, columns_N < half_in
    swapped_rows_N = torch.where(is_left_N, rows_N - half_out, rows_N + half_out)
    swapped_columns_N = torch.where(is_left_N, columns_N + half_in, columns_N - half_in)
    is_mixed_N = is_low_N ^ is_left_N
    return torch.where(is_mixed_N, swapped_rows_N, rows_N), torch.where(
        is_mixed_N, swapped_columns_N, columns_N
    )
