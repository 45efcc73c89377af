"""How blocks are laid together; what they mean is held in test_operators.py."""

from __future__ import annotations

import pytest
import torch

from timbre_methods.program import Block
from timbre_server.operators import block as block_operator
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.row_table import RowTable, Span


def test_channels_are_gathered_on_the_way_in_and_scattered_on_the_way_out() -> None:
    table = RowTable([Span(1, ((0, 2.0),)), Span(1, ((1, 1.0),))])
    x_TI = torch.tensor([[1.0, 10.0, 100.0], [1.0, 10.0, 100.0]])
    on_input = Block("input", torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [0.0, 3.0]]), 2)
    on_output = Block("output", torch.tensor([1]), torch.tensor([[1.0, 1.0, 0.5]]), 2)
    [changes] = BlockOperator().bind([{0: [on_input], 1: [on_output]}], table).sums(x_TI)
    found = torch.zeros(2, 2)
    for change in changes:
        assert isinstance(change.rows_N, torch.Tensor)
        found.index_add_(0, change.rows_N, change.values_NO)
    assert found.tolist() == [[204.0, 6.0], [0.0, 61.0]]


@pytest.mark.parametrize("side", ["input", "output"])
def test_small_blocks_of_one_shape_are_one_product_and_large_ones_are_not(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(8)
    shape = (24, 5) if side == "input" else (5, 16)
    features = 16 if side == "input" else 24
    parts = [
        Block(
            "input" if side == "input" else "output",
            torch.randperm(features, generator=generator)[:5],
            torch.randn(shape, generator=generator),
            24,
        )
        for _ in range(3)
    ]
    table = RowTable([Span(1, ((slot, 1.0),)) for slot in (2, 0, 1)])
    x_TI = torch.randn(3, 16, generator=generator)
    uses = [{slot: [part] for slot, part in enumerate(parts)}]
    [together] = BlockOperator().bind(uses, table).sums(x_TI)
    monkeypatch.setattr(block_operator, "MAX_POOLED_VALUES", 1)
    [alone] = BlockOperator().bind(uses, table).sums(x_TI)
    assert (len(together), len(alone)) == (1, 3)
    torch.testing.assert_close(together[0].values_NO, torch.cat([change.values_NO for change in alone]))
