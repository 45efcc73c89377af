"""Bases that many adapters share: regenerated bit for bit from a seed, or taken from a file or from W.

A basis lives as long as an adapter that uses it, and equal ones are one object: operators tell by identity
what they may compute once. A `Basis` is found by what its two matrices are made of (`Matrix.key`).

Legend: N stored coefficients or blocks, O out features, I in features, P and Q the sizes of a basis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from threading import RLock
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from timbre_methods.errors import InvalidConfig
from timbre_methods.program import Basis, Places

MAX_GRID = 2**28
"""The largest out x in whose places are drawn: the draw needs 8 bytes for each, 2 GiB at this size. Also the
most cells of a matrix that is drawn."""

NUM_KEPT = 64
"""Places that are kept for the next adapter beside those that are in use."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One side of a basis, ``[N, P, I]`` or ``[N, O, Q]`` float32: what it is, and how to make it.

    Equal keys mean equal values. ``make`` gives a tensor of its own, and is called only where nobody holds
    the matrix yet.
    """

    key: Hashable
    make: Callable[[], Tensor]


class _Bases:
    """The bases in use. Safe to call from any thread."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._matrices: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self._bases: WeakValueDictionary[Hashable, Basis] = WeakValueDictionary()
        self._sides: WeakKeyDictionary[Basis, tuple[Hashable, Hashable]] = WeakKeyDictionary()

    def basis(self, p: Matrix, q: Matrix, device: torch.device) -> Basis:
        with self._lock:
            basis = self._bases.get((p.key, q.key, device))
            if basis is None:
                basis = Basis(self._matrix(p, device), self._matrix(q, device))
                self._bases[p.key, q.key, device] = basis
                self._sides[basis] = (p.key, q.key)
            return basis

    def moved(self, basis: Basis, device: torch.device) -> Basis:
        with self._lock:
            sides = self._sides.get(basis) or (content_key(basis.p_NPI), content_key(basis.q_NOQ))
            p = Matrix(sides[0], lambda: basis.p_NPI.to(device))
            q = Matrix(sides[1], lambda: basis.q_NOQ.to(device))
            return self.basis(p, q, device)

    def _matrix(self, matrix: Matrix, device: torch.device) -> Tensor:
        found = self._matrices.get((matrix.key, device))
        if found is None:
            found = self._matrices[matrix.key, device] = matrix.make()
        return found


_IN_USE = _Bases()


def interned_basis(p: Matrix, q: Matrix, device: torch.device) -> Basis:
    """The one `Basis` of these two matrices, which are on this device; its sides are shared with other
    bases that have one of them. On the meta device nothing is shared."""
    if device.type == "meta":
        return Basis(p.make(), q.make())
    return _IN_USE.basis(p, q, device)


def shared_basis(p_NPI: Tensor, q_NOQ: Tensor) -> Basis:
    """The one `Basis` with these values, in float32 copies: for matrices from files and derived tensors.

    Reads the values, except on the meta device. The layout in memory is kept.
    """
    return interned_basis(_by_content(p_NPI), _by_content(q_NOQ), p_NPI.device)


def basis_on(basis: Basis, device: torch.device) -> Basis:
    """The same basis on a device: the very same object where it is there, else moved there once for all."""
    return basis if basis.p_NPI.device == device else _IN_USE.moved(basis, device)


def content_key(values: Tensor) -> Hashable:
    """A key that two tensors share exactly when their shapes and values are equal in float32."""
    if values.device.type == "meta":
        return ()
    flat = values.detach().to("cpu", torch.float32).contiguous().flatten()
    return tuple(values.shape), hashlib.sha256(flat.numpy().data).digest()


def _by_content(values: Tensor) -> Matrix:
    return Matrix(content_key(values), lambda: values.to(torch.float32, copy=True))


def fourier_places(
    seed: int, out_features: int, in_features: int, count: int, device: torch.device
) -> Places:
    """The places of FourierFT: the first ``count`` of ``torch.randperm(out * in)`` from a CPU generator.

    Always on the CPU; on the meta device nothing is drawn. Adapters of equal seed, shape and count get the
    very same object while it is among the last `NUM_KEPT` that were asked for.
    Raises `InvalidConfig` where out x in is above `MAX_GRID`.
    """
    if out_features * in_features > MAX_GRID:
        raise InvalidConfig(
            f"random places in a layer of {out_features} x {in_features} are not served: "
            f"the draw is limited to {MAX_GRID} cells; leave this layer out"
        )
    if device.type == "meta":
        rows_N = torch.empty(count, dtype=torch.int64, device="meta")
        return Places("dft", out_features, in_features, rows_N, torch.empty_like(rows_N))
    return _drawn_places(seed, out_features, in_features, count)


@lru_cache(maxsize=NUM_KEPT)
def _drawn_places(seed: int, out_features: int, in_features: int, count: int) -> Places:
    generator = torch.Generator().manual_seed(seed)
    # A copy, so that the cache does not keep the whole permutation alive.
    cells_N = torch.randperm(out_features * in_features, generator=generator)[:count].clone()
    return Places("dft", out_features, in_features, cells_N // in_features, cells_N % in_features)
