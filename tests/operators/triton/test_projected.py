"""The kernels for cores in a shared basis against the twin."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from timbre_methods.program import Basis, Projected
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.triton import projected as module
from timbre_server.operators.triton.projected import BoundCores, TritonProjected

IN = 20
Draw = Callable[[int, torch.Generator], Projected]


def basis(out: int, blocks: int = 1, q_blocks: int = 1, size: int = 6, q: int = 6) -> Basis:
    """The same numbers whenever it is asked for; equal matrices are told by identity alone."""
    generator = torch.Generator().manual_seed(out)
    p_NPI = torch.randn(blocks, size, IN, generator=generator) / 4
    return Basis(p_NPI, torch.randn(q_blocks, out, q, generator=generator) / 4)


def bases(twins: ModuleType, **sizes: int) -> dict[int, Basis]:
    return {out: basis(out, **sizes) for out in twins.OUTPUTS}


def diagonal(shared: dict[int, Basis], has_outer: bool = True) -> Draw:
    """Of VeRA, or without what comes after Q, with as many blocks as P has."""

    def draw(out: int, generator: torch.Generator) -> Projected:
        core = torch.randn(shared[out].p_NPI.shape[:2], generator=generator)
        outer = torch.randn(1, out, generator=generator) if has_outer else None
        return Projected("diagonal", core, shared[out], outer_NO=outer)

    return draw


def dense(shared: dict[int, Basis], has_outer: bool = False) -> Draw:
    def draw(out: int, generator: torch.Generator) -> Projected:
        core = torch.randn(shared[out].q_NOQ.shape[2], shared[out].p_NPI.shape[1], generator=generator)
        outer = torch.randn(1, out, generator=generator) if has_outer else None
        return Projected("dense", core, shared[out], outer_NO=outer)

    return draw


@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_every_crowd_gets_what_the_twin_gives(kind: str, crowd: str, twins: ModuleType) -> None:
    draw = diagonal(bases(twins)) if kind == "diagonal" else dense(bases(twins, size=5, q=7))
    bound = twins.check(TritonProjected(), ProjectedOperator(), draw, crowd, IN)
    assert isinstance(bound, BoundCores)


@pytest.mark.parametrize(
    "maker",
    [
        lambda twins: diagonal(bases(twins), has_outer=False),
        lambda twins: diagonal(bases(twins, blocks=3, q_blocks=3), has_outer=False),
        lambda twins: diagonal(bases(twins, blocks=3), has_outer=False),
        lambda twins: diagonal(bases(twins, size=300, q=300)),
        lambda twins: dense(bases(twins, size=70, q=40)),
        lambda twins: dense(bases(twins, size=5, q=7), has_outer=True),
    ],
    ids=["no outer", "blocks", "blocks with one Q", "wide diagonal", "wide core", "dense with outer"],
)
def test_each_shape_of_a_core(maker: Callable[[ModuleType], Draw], twins: ModuleType) -> None:
    bound = twins.check(TritonProjected(), ProjectedOperator(), maker(twins), "mixes", IN)
    assert isinstance(bound, BoundCores)


def test_several_bases_and_kinds_of_one_batch_stay_apart(twins: ModuleType) -> None:
    one, other = bases(twins), bases(twins, size=5, q=7)
    kinds = [diagonal(one), dense(other), diagonal(one, has_outer=False), diagonal(bases(twins))]

    def draw(out: int, generator: torch.Generator) -> Projected:
        return kinds[int(torch.randint(0, len(kinds), (1,), generator=generator))](out, generator)

    for crowd in ("zipf", "mixes"):
        twins.check(TritonProjected(), ProjectedOperator(), draw, crowd, IN)


def test_what_has_no_kernel_is_the_twins(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = bases(twins, size=5, q=7)

    def sparse(out: int, generator: torch.Generator) -> Projected:
        if torch.rand((), generator=generator) < 0.5:
            return dense(shared)(out, generator)
        rows, columns = (torch.randint(0, size, (9,), generator=generator) for size in (7, 5))
        return Projected("sparse", torch.randn(9, generator=generator), shared[out], rows, columns)

    bound = twins.check(TritonProjected(), ProjectedOperator(), sparse, "mixes", IN)
    assert isinstance(bound, JoinedSums)
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    many_rows = twins.check(TritonProjected(), ProjectedOperator(), dense(shared), "prefill", IN)
    assert isinstance(many_rows, JoinedSums)
