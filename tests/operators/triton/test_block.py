"""The kernels for dense blocks on some channels, against the twin."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import pytest
import torch

from timbre_methods.program import Block
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.triton import block as module
from timbre_server.operators.triton.block import BoundBlocks, TritonBlock

IN = 70
Side = Literal["input", "output"]


def part(side: Side, size: int, out: int, generator: torch.Generator) -> Block:
    index_N = torch.randperm(IN if side == "input" else out, generator=generator)[:size]
    shape = (out, len(index_N)) if side == "input" else (len(index_N), IN)
    return Block(side, index_N, torch.randn(shape, generator=generator) / size**0.5, out)


@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_every_crowd_gets_what_the_twin_gives(side: Side, crowd: str, twins: ModuleType) -> None:
    bound = twins.check(TritonBlock(), BlockOperator(), lambda out, g: part(side, 5, out, g), crowd, IN)
    assert isinstance(bound, BoundBlocks)


@pytest.mark.parametrize("crowd", ["zipf", "mixes"])
def test_blocks_of_both_sides_and_of_any_size_run_together(crowd: str, twins: ModuleType) -> None:
    sizes = (1, 5, 20, 66)

    def draw(out: int, generator: torch.Generator) -> Block:
        size, side = torch.randint(0, 4, (2,), generator=generator).tolist()
        return part("input" if side % 2 else "output", sizes[size], out, generator)

    assert isinstance(twins.check(TritonBlock(), BlockOperator(), draw, crowd, IN), BoundBlocks)


def test_an_adapter_with_many_rows_is_the_twins(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    bound = twins.check(
        TritonBlock(), BlockOperator(), lambda out, g: part("input", 5, out, g), "prefill", IN
    )
    assert isinstance(bound, JoinedSums)
