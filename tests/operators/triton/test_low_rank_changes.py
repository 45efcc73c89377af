"""ΔW of many low-rank adapters at once, against their factors' products."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from timbre_methods.program import LowRank
from timbre_server.native.formats import FORMATS
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.materialise import materialise
from timbre_server.operators.triton.low_rank import TritonLowRank


@pytest.mark.parametrize("shape", [(7, 80), (70, 5)], ids=str)
def test_ranks_and_numbers_of_parts_differ(shape: tuple[int, int], twins: ModuleType) -> None:
    generator = torch.Generator().manual_seed(shape[0])
    out_features, in_features = shape

    def part(rank: int, a_format: torch.dtype, b_format: torch.dtype) -> LowRank:
        a_RI = torch.randn(rank, in_features, generator=generator)
        b_OR = torch.randn(out_features, rank, generator=generator)
        return LowRank(a_RI.to(twins.DEVICE, a_format), b_OR.to(twins.DEVICE, b_format))

    whole, brain, half = FORMATS
    parts_S = [[part(1, whole, whole)], [], [part(20, brain, whole), part(3, half, brain)]]
    parts_S.append([part(16, brain, brain)])

    delta_SOI = materialise(parts_S, shape, [TritonLowRank()])

    torch.testing.assert_close(
        delta_SOI, materialise(parts_S, shape, [LowRankOperator()]), atol=2e-5, rtol=1e-5
    )
    for delta_OI, parts in zip(delta_SOI, parts_S, strict=True):
        expected = sum(
            (p.b_OR.double() @ p.a_RI.double() for p in parts), torch.zeros_like(delta_OI).double()
        )
        torch.testing.assert_close(delta_OI.double(), expected, atol=2e-5, rtol=1e-5)


def test_no_adapter_has_any() -> None:
    assert materialise([[], []], (3, 4), [TritonLowRank()]).tolist() == torch.zeros(2, 3, 4).tolist()
