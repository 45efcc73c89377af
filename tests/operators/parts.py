"""Random parts of every kind, for the tests of all operators. A new kind needs its maker here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from timbre_methods.packed_parts import PackedDense, PackedProjected
from timbre_methods.program import (
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
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.adapters.packed_parts import in_packed_basis
from timbre_server.native.formats import FORMATS
from timbre_server.native.panels import in_panels
from timbre_server.operators.catalogue import why_not
from timbre_server.operators.contract import Operator
from timbre_server.operators.packed_projected import has_whole_sides
from timbre_server.operators.rotation import narrowed
from timbre_server.operators.sliced_ellpack import slices_of


@dataclass(frozen=True)
class Draw:
    """Draws the numbers of one part."""

    in_features: int
    out_features: int
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count,), generator=self.generator)

    def count(self) -> int:
        return int(self.integers(9, 1)) + 1


def low_rank(draw: Draw) -> Part:
    """Each factor in one of the formats of these."""
    rank = draw.count()
    a_RI, b_OR = draw.normal(rank, draw.in_features), draw.normal(draw.out_features, rank)
    return LowRank(*(factor.to(FORMATS[draw.count() % len(FORMATS)]) for factor in (a_RI, b_OR)))


TRANSFORMS: tuple[Literal["dft", "dct", "hartley", "dwt"], ...] = ("dft", "dct", "hartley", "dwt")


def spectral(draw: Draw) -> Part:
    """One of the four transforms; equal places happen."""
    count = 4 * draw.count()
    name = TRANSFORMS[draw.count() % 4]
    low_pass = LOW_PASS["db2"] if name == "dwt" else ()
    sizes = [n + 2 + n % 2 if name == "dwt" else n for n in (draw.out_features, draw.in_features)]
    rows, columns = (draw.integers(size, count) for size in sizes)
    places = Places(name, draw.out_features, draw.in_features, rows, columns, low_pass)
    return Spectral(draw.normal(count) / 2, places)


def circulant(draw: Draw) -> Part:
    """In blocks of any size that fits."""
    largest = math.gcd(draw.in_features, draw.out_features)
    sizes = [b for b in range(1, largest + 1) if largest % b == 0]
    b = sizes[draw.count() % len(sizes)]
    shape = (draw.out_features // b, draw.in_features // b, b // 2 + 1, 2)
    return Circulant(draw.normal(*shape) / 4, b)


def sparse(draw: Draw) -> Sparse:
    count = 5 * draw.count()
    size = draw.out_features * draw.in_features
    flat = torch.randperm(size, generator=draw.generator)[:count].sort().values
    row_ends = torch.searchsorted(flat, torch.arange(draw.out_features + 1) * draw.in_features)
    return Sparse(row_ends, (flat % draw.in_features).int(), draw.normal(count), draw.in_features)


def sliced_ellpack(draw: Draw) -> Part:
    """With values in one of the formats of these."""
    part = slices_of(sparse(draw))
    return replace(part, values_KC=part.values_KC.to(FORMATS[draw.count() % len(FORMATS)]))


def block(draw: Draw) -> Part:
    size, on_input = 2 + draw.count() % 2, draw.count() % 2 == 0
    channels = torch.randperm(draw.in_features if on_input else draw.out_features, generator=draw.generator)
    if on_input:
        return Block("input", channels[:size], draw.normal(draw.out_features, size), draw.out_features)
    return Block("output", channels[:size], draw.normal(size, draw.in_features), draw.out_features)


def diagonal(draw: Draw) -> Part:
    count = draw.count()
    if count % 2:
        return Diagonal("input", draw.normal(draw.in_features))
    out_features = draw.out_features
    return Diagonal("output", draw.normal(out_features), draw.normal(out_features) if count % 4 else None)


def dense(draw: Draw) -> Part:
    return Dense(draw.normal(draw.out_features, draw.in_features))


def packed_dense(draw: Draw) -> Part:
    require_panels()
    delta_OI = draw.normal(draw.out_features, draw.in_features)
    return PackedDense(in_panels(delta_OI, is_rounded=True), (draw.out_features, draw.in_features))


def require_panels() -> None:
    """Which are as wide as the machine's registers want them."""
    if why_not("native") is not None:
        pytest.skip("C++ cannot be compiled here")


def kronecker(draw: Draw) -> Part:
    """Of the two splits that each size has, with w2 whole or in two factors of rank 2."""
    m = next(d for d in ((3, 2, 1), (5, 4, 1))[draw.count() % 2] if draw.in_features % d == 0)
    rows = next(d for d in ((2, 3, 1), (4, 5, 1))[draw.count() % 2] if draw.out_features % d == 0)
    k, n = draw.out_features // rows, draw.in_features // m
    w1_LM = draw.normal(rows, m)
    if draw.count() % 2:
        return Kronecker(w1_LM, draw.normal(k, n))
    return Kronecker(w1_LM, draw.normal(k, 2), draw.normal(2, n))


def projected(draw: Draw) -> Projected:
    """One of the three forms of a core, in a basis of 5 (and 7) directions."""
    form = ("diagonal", "dense", "sparse")[draw.count() % 3]
    blocks = 3 if form == "diagonal" and draw.count() % 2 else 1
    q = 5 if form == "diagonal" else 7
    basis = Basis(draw.normal(blocks, 5, draw.in_features) / 4, draw.normal(1, draw.out_features, q) / 4)
    if form == "dense":
        return Projected("dense", draw.normal(q, 5), basis)
    if form == "sparse":
        return Projected("sparse", draw.normal(9), basis, draw.integers(q, 9), draw.integers(5, 9))
    return Projected(
        "diagonal",
        draw.normal(blocks, 5),
        basis,
        inner_NI=draw.normal(blocks, draw.in_features) if blocks == 3 else None,
        outer_NO=draw.normal(blocks, draw.out_features),
    )


def packed_projected(draw: Draw) -> Part:
    require_panels()
    part = projected(draw)
    return in_packed_basis(part) if has_whole_sides(part) else packed_projected(draw)


def rotation(draw: Draw) -> Part:
    """One to three factors on either side, with chunks of one block or more; some scaled, some shared."""
    side: Literal["input", "output"] = "output" if draw.count() % 3 == 0 else "input"
    features = draw.in_features if side == "input" else draw.out_features
    blocks = [b for b in range(2, features + 1) if features % b == 0]
    block = blocks[draw.count() % len(blocks)]
    chunks = [block * n for n in (1, 2, 4) if block % 2 == 0 and features % (block * n) == 0] or [block]
    chunks = chunks[: draw.count() % 3 + 1]
    stored = 1 if draw.count() % 4 == 0 else features // block
    scale_O = draw.normal(draw.out_features) if side == "input" and draw.count() % 2 else None
    blocks_FSBB = draw.normal(len(chunks), stored, block, block) / block**0.5
    found = Rotation(side, blocks_FSBB, tuple(chunks[::-1]), scale_O)
    return narrowed(found) if draw.count() % 2 else found


RULES = (
    Rule(keep="top_k", top_k=2, gate="renormalised"),
    Rule(),
    Rule(keep="top_k", top_k=1, gate="one"),
    Rule(keep="top_p", top_p=0.6, gate="softmax"),
    Rule(reads="normalised", logits="absolute", scale=0.5, keep="top_k", top_k=3, gate="renormalised"),
    Rule(logits="unit", scale=3.0, keep="top_k", top_k=2, gate="renormalised", floor=0.1),
    Rule(gate="one"),
    Rule(keep="top_k", top_k=2, gate="logit"),
    Rule(scale=2.0, keep="top_k", top_k=3, again=True),
)


def routed(draw: Draw) -> Part:
    """One to five experts of several kinds, some of which do nothing here."""
    rule = RULES[draw.count() % len(RULES)]
    num_experts = draw.count() % 5 + 1
    router = Router(
        draw.normal(num_experts, draw.in_features) / 2,
        rule,
        bias_E=draw.normal(num_experts) if draw.count() % 2 else None,
        preference_E=draw.normal(num_experts) if draw.count() % 2 else None,
    )
    makers = (low_rank, low_rank, spectral, output_gain, dense)
    experts = []
    for number in range(num_experts):
        count = 1 if number == 0 else draw.count() % 3
        experts.append(tuple(makers[draw.count() % len(makers)](draw) for _ in range(count)))
    return Routed(tuple(experts), router)


def output_gain(draw: Draw) -> Part:
    return Diagonal("output", draw.normal(draw.out_features), draw.normal(draw.out_features))


def with_every_float(part: Any, value: float) -> Any:
    """The part with all its numbers replaced, those of its router and experts, too."""
    changes: dict[str, Any] = {}
    for field in fields(part):
        found = getattr(part, field.name)
        if isinstance(found, Tensor) and found.is_floating_point():
            changes[field.name] = torch.full_like(found, value)
        elif isinstance(found, Router):
            changes[field.name] = with_every_float(found, value)
    if isinstance(part, Routed):
        changes["experts"] = tuple(
            tuple(with_every_float(inner, value) for inner in expert) for expert in part.experts
        )
    return replace(part, **changes)


MAKERS: dict[type[Part], Callable[[Draw], Part]] = {
    LowRank: low_rank,
    Spectral: spectral,
    Circulant: circulant,
    Sparse: sparse,
    SlicedEllpack: sliced_ellpack,
    Block: block,
    Dense: dense,
    PackedDense: packed_dense,
    Kronecker: kronecker,
    Projected: projected,
    PackedProjected: packed_projected,
    Diagonal: diagonal,
    Rotation: rotation,
    Routed: routed,
}


def random_part(
    operator: Operator[Any], in_features: int, out_features: int, generator: torch.Generator
) -> Part:
    return MAKERS[operator.part](Draw(in_features, out_features, generator))
