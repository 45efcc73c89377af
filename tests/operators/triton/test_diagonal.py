"""The kernel for gains and shifts against the twin: side, dtype, rows and popularity."""

from __future__ import annotations

from types import ModuleType
from typing import Literal

import pytest
import torch

from timbre_methods.program import Diagonal
from timbre_server.operators.diagonal import DiagonalOperator
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.triton import diagonal
from timbre_server.operators.triton.diagonal import TritonDiagonal

IN = 37
Side = Literal["input", "output"]


def gains(side: Side, out: int, generator: torch.Generator) -> Diagonal:
    """Every other one has a shift."""
    size = IN if side == "input" else out
    shift = torch.randn(size, generator=generator) if torch.rand((), generator=generator) < 0.5 else None
    return Diagonal(side, torch.randn(size, generator=generator), None if side == "input" else shift)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("crowd", ["identical", "distinct", "uniform", "zipf", "mixes", "prefill"])
def test_every_crowd_gets_what_the_twin_gives(crowd: str, side: Side, twins: ModuleType) -> None:
    twins.check(TritonDiagonal(), DiagonalOperator(), lambda out, g: gains(side, out, g), crowd, IN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_base_s_output_in_half_precision_makes_a_change_in_float32(
    dtype: torch.dtype, twins: ModuleType
) -> None:
    generator = torch.Generator().manual_seed(1)
    part = Diagonal("output", torch.randn(20, generator=generator), torch.randn(20, generator=generator))
    table = RowTable([Span(1), Span(3, ((0, 0.5),))], twins.DEVICE)
    y_TO = torch.randn(4, 20, generator=generator).to(twins.DEVICE, dtype)
    change = TritonDiagonal().bind([{0: [twins.on_device(part)]}], table).output_change(0, y_TO)
    assert change is not None
    assert (change.rows_N, change.values_NO.dtype) == (slice(1, 4), torch.float32)
    expected = 0.5 * ((part.gain - 1) * y_TO[1:].float().cpu() + part.shift)
    torch.testing.assert_close(change.values_NO.cpu(), expected, atol=1e-6, rtol=1e-6)


def test_features_of_several_blocks(twins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagonal, "WIDTH", 16)
    twins.check(TritonDiagonal(), DiagonalOperator(), lambda out, g: gains("input", out, g), "mixes", IN)


def test_an_adapter_s_shift_does_not_wait_for_its_gain(twins: ModuleType) -> None:
    """A gain of 1 and a shift: only the shift remains, also where v is no number's neighbour."""
    part = Diagonal("output", torch.ones(20), torch.arange(20.0))
    table = RowTable([Span(2, ((0, 2.0),))], twins.DEVICE)
    y_TO = torch.full((2, 20), 1e30, device=twins.DEVICE)
    change = TritonDiagonal().bind([{0: [twins.on_device(part)]}], table).output_change(0, y_TO)
    assert change is not None
    assert torch.equal(change.values_NO.cpu(), 2 * torch.arange(20.0).expand(2, 20))


def test_a_side_without_gains_changes_nothing(twins: ModuleType) -> None:
    part = twins.on_device(Diagonal("input", torch.ones(IN)))
    bound = TritonDiagonal().bind([{0: [part]}], RowTable([Span(2, ((0, 1.0),))], twins.DEVICE))
    assert bound.output_change(0, torch.ones(2, 20, device=twins.DEVICE)) is None
    assert not bound.reads_input_alone
