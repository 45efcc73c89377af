"""Greedy choice, truncation and inverse CDF against plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timbre_server.engine import draw


def kept_by_definition(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> set[int]:
    best = max(logits)
    weights = [math.exp((logit - best) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        kth = logits[order[min(top_k, len(order)) - 1]]
        order = [token for token in order if logits[token] >= kth]
    mass, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if top_p < 1 and kept and before >= top_p * mass:
            break
        kept.append(token)
        before += weights[token]
    return {token for token in kept if weights[token] >= min(min_p, 1.0)}


def kept_by_us(
    logits_NV: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> list[set[int]]:
    count = logits_NV.shape[0]
    best_N, _ = draw.greedy(logits_NV)
    weight_NV = draw.weights(logits_NV, best_N, torch.full((count,), temperature))
    cut = draw.Truncation(
        torch.full((count,), top_k),
        torch.full((count,), top_p, dtype=torch.float64),
        torch.full((count,), min_p),
    )
    draw.truncate(weight_NV, cut)
    return [set(row.nonzero()[:, 0].tolist()) for row in weight_NV]


CUTS = [
    (0, 0.9, 0.0),
    (0, 0.5, 0.0),
    (0, 0.999, 0.0),
    (0, 0.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (5000, 1.0, 0.0),
    (0, 1.0, 0.1),
    (0, 1.0, 1.0),
    (20, 0.8, 0.0),
    (0, 0.95, 0.02),
    (50, 0.9, 0.05),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CUTS)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("vocabulary", [10, 256, 1000])
def test_truncation_keeps_what_its_definition_keeps(
    top_k: int, top_p: float, min_p: float, temperature: float, vocabulary: int
) -> None:
    logits_NV = torch.randn(4, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    expected = [kept_by_definition(row, temperature, top_k, top_p, min_p) for row in logits_NV.tolist()]
    assert kept_by_us(logits_NV, temperature, top_k, top_p, min_p) == expected


@given(
    ranks=st.lists(st.integers(0, 4), min_size=2, max_size=40),
    top_k=st.integers(0, 6),
    top_p=st.sampled_from([0.05, 0.31, 0.62, 0.87, 1.0]),
)
def test_ties_stay_together_in_top_k_and_are_cut_in_token_order_in_top_p(
    ranks: list[int], top_k: int, top_p: float
) -> None:
    logits = [math.log(3.0) * rank for rank in ranks]
    as_float32 = torch.tensor([logits])
    expected = kept_by_definition(as_float32[0].tolist(), 1.0, top_k, top_p, 0.0)
    assert kept_by_us(as_float32, 1.0, top_k, top_p, 0.0) == [expected]


def test_bfloat16_like_logits_with_many_ties_are_cut_at_the_same_place() -> None:
    logits_NV = (torch.randn(3, 2000, generator=torch.Generator().manual_seed(1)) * 2).bfloat16().float()
    expected = [kept_by_definition(row, 1.0, 0, 0.7, 0.0) for row in logits_NV.tolist()]
    assert kept_by_us(logits_NV, 1.0, 0, 0.7, 0.0) == expected


def test_one_likely_token_is_all_that_a_very_cold_row_keeps() -> None:
    logits_NV = torch.arange(100, dtype=torch.float32)[None]
    assert kept_by_us(logits_NV, 1e-3, 50, 0.95, 0.0) == [{99}]


@pytest.mark.parametrize("vocabulary", [1, 5, 255, 256, 257, 1024])
def test_greedy_takes_the_lowest_of_equal_tokens(vocabulary: int) -> None:
    logits_NV = torch.zeros(2, vocabulary)
    logits_NV[1, vocabulary // 2 :] = 3.0
    best_N, token_N = draw.greedy(logits_NV)
    assert best_N.tolist() == [0.0, 3.0]
    assert token_N.tolist() == [0, vocabulary // 2]


@pytest.mark.parametrize("vocabulary", [3, 256, 700])
def test_a_uniform_number_picks_the_token_whose_share_it_falls_into(vocabulary: int) -> None:
    weight_V = torch.rand(vocabulary, generator=torch.Generator().manual_seed(3)) * (
        torch.arange(vocabulary) % 3 > 0
    )
    upto = weight_V.double().cumsum(0) / weight_V.double().sum()
    for number in [0.0, 0.1, 0.5, 0.77, 0.999, 1 - 2**-53]:
        expected = next(
            token for token in range(vocabulary) if upto[token] > number or token == vocabulary - 1
        )
        drawn = draw.draw(weight_V[None], torch.tensor([number], dtype=torch.float64))
        assert weight_V[drawn] > 0
        assert drawn.tolist() == [expected] or number > 0.9999


def test_a_token_without_weight_is_never_drawn() -> None:
    weight_V = torch.zeros(600)
    weight_V[[10, 300, 599]] = torch.tensor([1e-30, 1.0, 1e-30])
    numbers = torch.cat([torch.linspace(0, 1, 101, dtype=torch.float64)[:-1], torch.tensor([1 - 2**-53])])
    drawn = draw.draw(weight_V.expand(len(numbers), -1), numbers.double())
    assert set(drawn.tolist()) <= {10, 300, 599}


def test_ranked_orders_by_value_and_then_by_token() -> None:
    value_NV = torch.tensor([[1.0, 5.0, 1.0, 5.0, 2.0], [0.0, 0.0, 9.0, 0.0, 0.0]])
    value_NC, id_NC, size_N = draw.ranked(value_NV, value_NV >= 1.0)
    assert size_N.tolist() == [5, 1]
    assert id_NC[0].tolist() == [1, 3, 4, 0, 2]
    assert (value_NC[1, 0].item(), id_NC[1, 0].item()) == (9.0, 2)
