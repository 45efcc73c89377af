"""Which entries a rotation couples, by literals, and how many products a batch of them takes."""

from __future__ import annotations

import pytest
import torch

from timbre_methods.program import Rotation
from timbre_server.operators import rotation
from timbre_server.operators.rotation import RotationOperator
from timbre_server.operators.row_table import RowTable, Span

SWAP = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
X = torch.arange(8.0).unsqueeze(0)


@pytest.mark.parametrize(
    ("chunk", "expected"),
    [
        (2, [1.0, 0, 3, 2, 5, 4, 7, 6]),
        (4, [2.0, 3, 0, 1, 6, 7, 4, 5]),
        (8, [4.0, 5, 6, 7, 0, 1, 2, 3]),
    ],
)
def test_a_block_couples_the_halves_of_its_chunk(chunk: int, expected: list[float]) -> None:
    part = Rotation("input", SWAP.expand(1, 4, 2, 2), (chunk,))
    change = RotationOperator().meaning(part, X, X).input_change_TI
    assert change is not None
    assert (X + change).tolist() == [expected]


def test_pieces_of_larger_blocks_stay_whole() -> None:
    swap_halves = torch.eye(4).roll(2, 0)
    part = Rotation("input", swap_halves.expand(1, 2, 4, 4), (8,))
    change = RotationOperator().meaning(part, X, X).input_change_TI
    assert change is not None
    assert (X + change).tolist() == [[4.0, 5, 6, 7, 0, 1, 2, 3]]


def test_the_first_factor_acts_first() -> None:
    twice = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    blocks_FSBB = torch.stack([SWAP, twice]).view(2, 1, 2, 2)
    part = Rotation("output", blocks_FSBB, (2, 2))
    change = RotationOperator().meaning(part, X, X).change_TO
    assert change is not None
    assert (X + change).tolist() == [[2.0, 0, 6, 2, 10, 4, 14, 6]]


def test_pairs_of_one_shape_are_turned_together_and_others_apart() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [Rotation("output", torch.randn(1, 4, 2, 2, generator=generator), (2,)) for _ in range(3)]
    parts.append(Rotation("output", torch.randn(1, 2, 4, 4, generator=generator), (4,)))
    table = RowTable([Span(1, ((slot, 1.0),)) for slot in range(4)])
    y_TO = torch.randn(4, 8, generator=generator)

    change = RotationOperator().bind([{i: [part] for i, part in enumerate(parts)}], table)
    found = change.output_change(0, y_TO)

    assert found is not None
    assert isinstance(found.rows_N, torch.Tensor)
    assert found.rows_N.tolist() == [0, 1, 2, 3]
    for row, part in enumerate(parts):
        rows = slice(row, row + 1)
        expected = RotationOperator().meaning(part, y_TO[rows], y_TO[rows]).change_TO
        torch.testing.assert_close(found.values_NO[rows], expected)


def test_large_blocks_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    parts = [Rotation("output", torch.randn(1, 2, 4, 4, generator=generator), (4,)) for _ in range(3)]
    uses = [{slot: [part] for slot, part in enumerate(parts)}]
    table = RowTable([Span(1, ((0, 1.0),)), Span(2, ((1, 0.5),)), Span(1, ((2, -1.0), (0, 2.0)))])
    y_TO = torch.randn(4, 8, generator=generator)
    sums = []
    for largest in (rotation.MAX_STACKED_BLOCK, 3):
        monkeypatch.setattr(rotation, "MAX_STACKED_BLOCK", largest)
        if largest < 4:
            monkeypatch.setattr(rotation, "_stacked", None)
        change = RotationOperator().bind(uses, table).output_change(0, y_TO)
        assert change is not None
        assert isinstance(change.rows_N, torch.Tensor)
        sums.append(torch.zeros(4, 8).index_add_(0, change.rows_N, change.values_NO))
    torch.testing.assert_close(sums[0], sums[1])
