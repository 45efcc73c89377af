from __future__ import annotations

import torch

from timbre_methods.program import LowRank
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.row_table import RowTable, Span


def test_several_parts_at_one_site_are_summed() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [
        LowRank(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))
        for rank in (3, 2)
    ]
    x_TI = torch.randn(3, 6, generator=generator)

    [[change]] = LowRankOperator().bind([{7: parts}], RowTable([Span(3, ((7, 0.5),))])).sums(x_TI)

    dense_OI = parts[0].b_OR @ parts[0].a_RI + parts[1].b_OR @ parts[1].a_RI
    expected = torch.zeros(3, 5).index_add_(0, torch.arange(3), 0.5 * x_TI @ dense_OI.T)
    torch.testing.assert_close(change.values_NO, expected, atol=1e-5, rtol=1e-5)
