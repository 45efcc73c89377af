"""Bases that many adapters share: regenerated bit for bit from a seed, or taken from a file or from W.

A basis lives as long as an adapter that uses it, and equal ones are one object: operators tell by identity
what they may compute once. A `Basis` is found by what its two matrices are made of (`Matrix.key`).

Legend: N blocks, O out features, I in features, P and Q the sizes of a basis.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import RLock
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from timbre_methods.errors import InvalidTensors
from timbre_methods.packed_parts import PackedBasis
from timbre_methods.program import Basis

MAX_GRID = 2**28
"""The most cells of a matrix, or of a layer's [O, I], in which anything is drawn."""


Move = Callable[[Tensor], Tensor]
"""Puts a tensor on a device, laid out as it is."""


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
        self._packed: WeakValueDictionary[Hashable, PackedBasis] = WeakValueDictionary()
        self._sides: WeakKeyDictionary[Basis, tuple[Hashable, Hashable]] = WeakKeyDictionary()

    def basis(self, p: Matrix, q: Matrix, device: torch.device) -> Basis:
        with self._lock:
            basis = self._bases.get((p.key, q.key, device))
            if basis is None:
                basis = Basis(self._matrix(p, device), self._matrix(q, device))
                self._bases[p.key, q.key, device] = basis
                self._sides[basis] = (p.key, q.key)
            return basis

    def moved(self, basis: Basis, device: torch.device, move: Move) -> Basis:
        with self._lock:
            p_key, q_key = self._keys(basis)
            p = Matrix(p_key, lambda: move(basis.p_NPI))
            q = Matrix(q_key, lambda: move(basis.q_NOQ))
            return self.basis(p, q, device)

    def packed(self, basis: Basis, panels_of: Move) -> PackedBasis:
        p_NPI, q_NOQ = basis.p_NPI, basis.q_NOQ
        with self._lock:
            keys = self._keys(basis)
            found = self._packed.get(keys)
            if found is None:
                p = Matrix(("P in panels", keys[0]), lambda: panels_of(p_NPI.flatten(0, 1)))
                q = Matrix(("Q in panels", keys[1]), lambda: panels_of(q_NOQ.transpose(0, 1).flatten(1)))
                panels = self._matrix(p, p_NPI.device), self._matrix(q, q_NOQ.device)
                found = self._packed[keys] = PackedBasis(*panels, _shape(p_NPI), _shape(q_NOQ))
            return found

    def _keys(self, basis: Basis) -> tuple[Hashable, Hashable]:
        return self._sides.get(basis) or (content_key(basis.p_NPI), content_key(basis.q_NOQ))

    def _matrix(self, matrix: Matrix, device: torch.device) -> Tensor:
        found = self._matrices.get((matrix.key, device))
        if found is None:
            found = matrix.make()
            _check_finite(found)
            self._matrices[matrix.key, device] = found
        return found


def _check_finite(values: Tensor) -> None:
    """Finite values may overflow where they are multiplied, or rounded."""
    if not values.is_meta and not values.isfinite().all():
        held = str(values.dtype).removeprefix("torch.")
        raise InvalidTensors(
            f"the values of a basis that it uses come to more than {held} holds; train it with smaller ones"
        )


_IN_USE = _Bases()


def interned_basis(p: Matrix, q: Matrix, device: torch.device) -> Basis:
    """The one `Basis` of these two matrices, which are on this device; its sides are shared with other
    bases that have one of them. On the meta device too, so that their bytes are counted once.

    Raises: InvalidTensors for values that are not finite, as do all that give a basis here.
    """
    return _IN_USE.basis(p, q, device)


def shared_basis(p_NPI: Tensor, q_NOQ: Tensor) -> Basis:
    """The one `Basis` with these values, in float32 copies: for matrices from files and derived tensors.

    Reads the values, except on the meta device. The layout in memory of several blocks is kept; one lies row
    by row, as it is read, however a decomposition has laid it out.
    """
    return interned_basis(_by_content(p_NPI), _by_content(q_NOQ), p_NPI.device)


def basis_on(basis: Basis, device: torch.device, move: Move) -> Basis:
    """The same basis on a device: the very same object where it is there, else moved there once for all."""
    return basis if basis.p_NPI.device == device else _IN_USE.moved(basis, device, move)


def packed_basis(basis: Basis, panels_of: Move) -> PackedBasis:
    """The one `PackedBasis` of a basis; ``panels_of`` makes the panels of a matrix."""
    return _IN_USE.packed(basis, panels_of)


def content_key(values: Tensor) -> Hashable:
    """A key that two tensors share exactly when their shapes and values are equal in float32."""
    if values.device.type == "meta":
        return object()  # Nobody can tell: equal to nothing else.
    flat = values.detach().to("cpu", torch.float32).contiguous().flatten()
    return tuple(values.shape), hashlib.sha256(flat.numpy().data).digest()


def _shape(side: Tensor) -> tuple[int, int, int]:
    first, second, third = side.shape
    return first, second, third


def _by_content(values: Tensor) -> Matrix:
    form = torch.contiguous_format if len(values) == 1 else torch.preserve_format
    return Matrix(content_key(values), lambda: values.to(torch.float32, copy=True, memory_format=form))
