"""The kernels that turn inputs and outputs, against the twin."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Literal

import pytest
import torch

from timbre_methods.program import Rotation
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.triton import rotation as module
from timbre_server.operators.triton.rotation import TritonRotation

IN = 12


def on_input(
    size: int, chunks: tuple[int, ...], stored: int | None = None, is_scaled: bool = False
) -> Callable[[int, torch.Generator], Rotation]:
    def draw(out: int, generator: torch.Generator) -> Rotation:
        shape = (len(chunks), stored or IN // size, size, size)
        scale = torch.randn(out, generator=generator) if is_scaled else None
        return Rotation("input", torch.randn(shape, generator=generator) / size**0.5, chunks, scale)

    return draw


@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
def test_every_crowd_gets_what_the_twin_gives(crowd: str, twins: ModuleType) -> None:
    twins.check(TritonRotation(), RotationOperator(), on_input(4, (4,)), crowd, IN)


@pytest.mark.parametrize(
    "draw",
    [
        on_input(2, (12, 4, 2)),
        on_input(3, (3,)),
        on_input(4, (12, 4), stored=1),
        on_input(6, (6,), is_scaled=True),
        on_input(12, (12,), is_scaled=True),
    ],
    ids=["butterfly", "odd blocks", "one block for all", "scaled", "whole"],
)
def test_each_shape_of_a_rotation(
    draw: Callable[[int, torch.Generator], Rotation], twins: ModuleType
) -> None:
    twins.check(TritonRotation(), RotationOperator(), draw, "mixes", IN)


def test_outputs_are_turned_beside_inputs(twins: ModuleType) -> None:
    def draw(out: int, generator: torch.Generator) -> Rotation:
        side: Literal["input", "output"] = "output" if torch.rand((), generator=generator) < 0.5 else "input"
        size = 4 if side == "input" else out
        features = IN if side == "input" else out
        blocks = torch.randn(1, features // size, size, size, generator=generator) / size**0.5
        return Rotation(side, blocks, (size,))

    twins.check(TritonRotation(), RotationOperator(), draw, "zipf", IN)


def test_an_adapter_with_many_rows_is_turned_by_itself(
    twins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    twins.check(TritonRotation(), RotationOperator(), on_input(4, (4,)), "prefill", IN)
