"""Random parts of the kinds that are bound for one table after another, at two layers that read one input.

Legend: O out, I in, R ranks, N coefficients.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import (
    AdapterProgram,
    Basis,
    Block,
    Circulant,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Part,
    Places,
    Projected,
    Rotation,
    Sparse,
    Spectral,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.adapters.packed_parts import in_packed_basis
from timbre_server.native.panels import in_panels
from timbre_server.operators.sliced_ellpack import slices_of

PATHS = ("q", "k")
SIZES = {"q": 20, "k": 12}
IN = 24


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape)


def low_rank(out: int) -> Part:
    rank = random.randint(1, 9)
    return LowRank(numbers(rank, IN), numbers(out, rank))


def sparse(out: int) -> Part:
    is_there_OI = torch.rand(out, IN) < 0.2
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), is_there_OI.sum(1).cumsum(0)])
    columns = is_there_OI.nonzero()[:, 1].to(torch.int32)
    return slices_of(Sparse(ends, columns, numbers(len(columns)), IN))


TRANSFORMS: tuple[Literal["dft", "dct", "hartley", "dwt"], ...] = ("dft", "dct", "hartley", "dwt")
PLACES = {
    (transform, seed, out): Places(
        transform,
        out,
        IN,
        *(torch.randint(n, (30,), generator=torch.Generator().manual_seed(seed)) for n in (out, IN)),
        LOW_PASS["db2"] if transform == "dwt" else (),
    )
    for transform in TRANSFORMS
    for seed in (0, 1)
    for out in SIZES.values()
}


def spectral(out: int, transform: str = "dft", seed: int = 0) -> Part:
    return Spectral(numbers(30), PLACES[transform, seed, out])


def circulant(out: int, block_size: int = 4) -> Part:
    return Circulant(numbers(out // block_size, IN // block_size, block_size // 2 + 1, 2), block_size)


def circulant_of_any_size(out: int) -> Part:
    largest = math.gcd(out, IN)
    return circulant(out, random.choice([b for b in range(1, largest + 1) if largest % b == 0]))


MATRICES = [torch.randn(1, size, IN) for size in (6, 9)]
BASES = [
    {out: Basis(p_NPI, torch.randn(1, out, p_NPI.shape[1])) for out in SIZES.values()} for p_NPI in MATRICES
]


def projected(out: int) -> Projected:
    outer_NO = random.choice([None, numbers(1, out)])
    return Projected("diagonal", numbers(1, 6), BASES[0][out], outer_NO=outer_NO)


def projected_with_inner(out: int) -> Part:
    """Three blocks of one basis."""
    inner_NI, outer_NO = numbers(3, IN), numbers(3, out)
    return Projected("diagonal", numbers(3, 9), BASES[1][out], inner_NI=inner_NI, outer_NO=outer_NO)


def projected_elsewhere(out: int) -> Part:
    """In the other basis, or in one of its own."""
    basis = random.choice([BASES[1][out], Basis(numbers(1, 9, IN), numbers(1, out, 9))])
    return Projected("diagonal", numbers(1, 9), basis)


def dense_core(out: int) -> Projected:
    return Projected("dense", numbers(6, 6), BASES[0][out])


def sparse_core(out: int) -> Projected:
    rows_K, columns_K = torch.randint(9, (2, 14))
    return Projected("sparse", numbers(14), BASES[1][out], rows_K, columns_K)


def packed_projected(out: int) -> Part:
    """In the first basis, or in one of its own."""
    own = Projected("diagonal", numbers(1, 17), Basis(numbers(1, 17, IN), numbers(1, out, 17)))
    return in_packed_basis(random.choice([projected(out), own]))


def packed_cores(out: int) -> Part:
    return in_packed_basis(random.choice([dense_core, sparse_core])(out))


def gain_on_output(out: int) -> Part:
    return Diagonal("output", numbers(out), random.choice([None, numbers(out)]))


def gain_on_input(out: int) -> Part:
    return Diagonal("input", numbers(IN))


def turned_output(out: int) -> Part:
    """Of two factors, the first of which couples entries that lie apart."""
    return Rotation("output", numbers(2, out // 4, 4, 4) / 2, (out, 4))


def turned_input(out: int) -> Part:
    """By one block, by a block for each half or by one for both."""
    stored, size = random.choice([(1, IN), (2, IN // 2), (1, IN // 2)])
    return Rotation("input", numbers(1, stored, size, size) / 4, (size,))


def scaled_rotation(out: int) -> Part:
    return Rotation("input", numbers(1, 6, 4, 4) / 2, (4,), numbers(out))


def kronecker(out: int) -> Part:
    """With w2 whole or in factors of rank 3."""
    rows, m = random.choice([1, 2, 4]), random.choice([1, 3, 8])
    k, n = out // rows, IN // m
    whole, factors = (numbers(k, n),), (numbers(k, 3), numbers(3, n))
    return Kronecker(numbers(rows, m), *random.choice([whole, factors]))


def block(out: int) -> Part:
    channels, size = random.randint(1, 10), random.choice([IN, out])
    index = torch.randperm(size)[:channels]
    if size == IN:
        return Block("input", index, numbers(out, channels), out)
    return Block("output", index, numbers(channels, IN), out)


def dense(out: int) -> Part:
    return Dense(numbers(out, IN))


def dense_in_panels(out: int) -> Part:
    return PackedDense(in_panels(numbers(out, IN), is_rounded=True), (out, IN))


def mixture(out: int) -> Part:
    """Of experts of low rank or gains; now and then of others, or of none where one does nothing here."""
    count = random.randint(2, 4)
    rule = Rule(keep="top_k", top_k=random.randint(1, count), gate="renormalised")
    others: list[list[Callable[[int], Part]]] = [
        [gain_on_output],
        [low_rank, gain_on_output],
        [low_rank, spectral],
        [spectral, gain_on_output],
    ]
    makes = random.choice([[low_rank], [low_rank], [low_rank], *others])
    experts = tuple(
        tuple(random.choice(makes)(out) for _ in range(random.choice([0, 1, 1, 2]))) for _ in range(count)
    )
    return Routed(experts, Router(numbers(count, IN), rule))


KINDS: Mapping[str, tuple[Callable[[int], Part], ...]] = {
    "low rank": (low_rank,),
    "sparse": (sparse,),
    "gains": (gain_on_output, gain_on_input),
    "rotations": (turned_output, turned_input),
    "rotations with scales": (scaled_rotation, turned_input),
    "spectral": (spectral,),
    "spectral of two seeds": (spectral, partial(spectral, seed=1)),
    "spectral of any transform": tuple(partial(spectral, transform=each) for each in TRANSFORMS),
    "circulant": (circulant,),
    "circulant of any size": (circulant_of_any_size,),
    "shared basis": (projected,),
    "shared bases": (projected, projected_with_inner, projected_elsewhere),
    "dense cores": (dense_core,),
    "sparse cores": (sparse_core,),
    "cores of any form": (projected, projected_with_inner, dense_core, sparse_core),
    "packed bases": (packed_projected, packed_cores, projected_elsewhere),
    "kronecker": (kronecker,),
    "blocks": (dense, block, dense_in_panels),
    "mixtures": (mixture,),
    "all": (
        low_rank,
        sparse,
        gain_on_output,
        gain_on_input,
        turned_output,
        turned_input,
        spectral,
        circulant,
        projected,
        projected_with_inner,
        dense_core,
        sparse_core,
        packed_projected,
        kronecker,
        block,
        dense_in_panels,
        mixture,
    ),
}


def program(makes: tuple[Callable[[int], Part], ...]) -> AdapterProgram:
    """With one or two parts, at some of the layers."""
    paths = random.choice([PATHS, PATHS[:1], PATHS[1:]])
    return AdapterProgram(
        {
            path: tuple(random.choice(makes)(SIZES[path]) for _ in range(random.randint(1, 2)))
            for path in paths
        }
    )
