"""Operators on token ids against those of linear layers on one-hot rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from timbre_methods.program import Dense, Diagonal, LowRank, Part, Rotation, TokenRows
from timbre_server.operators.catalogue import all_operators, embedding_operators
from timbre_server.operators.contract import Bound
from timbre_server.operators.row_table import RowTable, Span

VOCABULARY, WIDTH = 11, 6
SPANS = [Span(3, ((0, 1.0),)), Span(2), Span(1, ((1, -0.5),)), Span(20, ((1, 0.25), (0, 2.0)))]
LOOKUPS = {operator.part: operator for operator in embedding_operators()}
LINEAR = {operator.part: operator for operator in all_operators()}


def low_rank(generator: torch.Generator) -> LowRank:
    normal = torch.randn(2, VOCABULARY + WIDTH, generator=generator)
    return LowRank(normal[:, :VOCABULARY], normal[:, VOCABULARY:].T)


def token_rows(generator: torch.Generator) -> TokenRows:
    tokens = torch.randperm(VOCABULARY, generator=generator)[:5].sort().values
    return TokenRows(tokens, torch.randn(5, WIDTH, generator=generator))


def as_linear(part: Part) -> Part:
    """The same change of the table as a part of a linear layer."""
    if not isinstance(part, TokenRows):
        return part
    delta_OI = torch.zeros(WIDTH, VOCABULARY)
    delta_OI[:, part.tokens_K] = part.rows_KO.T
    return Dense(delta_OI)


def total(bound: Bound, x: Tensor, num_rows: int) -> Tensor:
    sums_TO, every = torch.zeros(num_rows, WIDTH), torch.arange(num_rows)
    for change in bound.sums(x)[0]:
        rows = change.rows_N if isinstance(change.rows_N, Tensor) else every[change.rows_N or slice(None)]
        sums_TO.index_add_(0, rows, change.values_NO)
    return sums_TO


def dense(generator: torch.Generator) -> Dense:
    return Dense(torch.randn(WIDTH, VOCABULARY, generator=generator))


@pytest.mark.parametrize("make", [low_rank, dense, token_rows], ids=["low rank", "dense", "rows"])
def test_a_lookup_is_the_linear_part_on_one_hot_tokens(make: Callable[[torch.Generator], Part]) -> None:
    generator = torch.Generator().manual_seed(1)
    parts = [make(generator), make(generator)]
    table = RowTable(SPANS)
    ids_T = torch.randint(VOCABULARY, (table.num_rows,), generator=generator)
    ids_T[:2] = torch.tensor([0, VOCABULARY - 1])
    one_hot_TV = one_hot(ids_T, VOCABULARY).float()

    lookup = LOOKUPS[type(parts[0])].bind([{0: [parts[0]], 1: [parts[1]]}], table)
    others = [as_linear(part) for part in parts]
    linear = LINEAR[type(others[0])].bind([{0: [others[0]], 1: [others[1]]}], table)

    found_TO = total(lookup, ids_T, table.num_rows)
    torch.testing.assert_close(found_TO, total(linear, one_hot_TV, table.num_rows), atol=1e-5, rtol=1e-5)
    y_TO = torch.zeros(table.num_rows, WIDTH)
    meaning = LOOKUPS[type(parts[0])].meaning(parts[0], ids_T, y_TO).change_TO
    as_meant = LINEAR[type(others[0])].meaning(others[0], one_hot_TV, y_TO).change_TO
    torch.testing.assert_close(meaning, as_meant)


def test_rows_that_are_not_finite_spoil_their_own_token_alone() -> None:
    part = TokenRows(torch.tensor([2, 4]), torch.tensor([[1.0] * WIDTH, [float("inf")] * WIDTH]))
    table = RowTable([Span(4, ((0, 1.0),))])
    bound = LOOKUPS[TokenRows].bind([{0: [part]}], table)
    [[change]] = bound.sums(torch.tensor([2, 4, 3, 9]))
    assert torch.equal(
        change.values_NO[[0, 2, 3]], torch.tensor([1.0, 0.0, 0.0]).unsqueeze(1).expand(3, WIDTH)
    )


def test_embeddings_have_the_operators_of_all_parts_that_act_on_outputs() -> None:
    assert set(LOOKUPS) == {LowRank, Dense, TokenRows, Diagonal, Rotation}
