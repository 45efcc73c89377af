"""Every sampling parameter against a plain reference, and rows that know nothing of each other."""

from __future__ import annotations

import math
from array import array
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from timbre_server.engine.messages import SamplingParams
from timbre_server.engine.sampler import LOWEST_LOGPROB, SamplingRow, prompt_logprobs, sample, uniform

VOCAB = 300
PROMPT = [3, 5, 5, 8, 299]
NONE = array("q")
OUTPUT = [8, 9, 9, 9, 12]


def some_logits(seed: int = 0, rows: int = 1, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def a_row(output: list[int] | None = None, **params: Any) -> SamplingRow:
    output = OUTPUT if output is None else output
    return SamplingRow(SamplingParams(**params), array("q", {*PROMPT, *output}), output)


def reference_logits(logits: list[float], row: SamplingRow) -> list[float]:
    params, adjusted = row.params, list(logits)
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    for token in row.seen_token_ids:
        value = adjusted[token]
        adjusted[token] = (
            value * params.repetition_penalty if value < 0 else value / params.repetition_penalty
        )
    for token, count in Counter(row.output_token_ids).items():
        adjusted[token] -= params.presence_penalty + params.frequency_penalty * count
    if len(row.output_token_ids) < params.min_tokens:
        for token in params.stop_token_ids:
            adjusted[token] = -math.inf
    return adjusted


def reference_token(logits: list[float], row: SamplingRow) -> int:
    params = row.params
    adjusted = reference_logits(logits, row)
    best = max(adjusted)
    if params.temperature == 0:
        return adjusted.index(best)
    weights = [math.exp((logit - best) / params.temperature) for logit in adjusted]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if params.top_k:
        kth = weights[order[min(params.top_k, len(order)) - 1]]
        order = [token for token in order if weights[token] >= kth]
    mass, before, kept = sum(weights[token] for token in order), 0.0, []
    for token in order:
        if params.top_p < 1 and kept and before >= params.top_p * mass:
            break
        kept.append(token)
        before += weights[token]
    kept = sorted(token for token in kept if weights[token] >= params.min_p)
    target = uniform(params.seed, len(row.output_token_ids)) * sum(weights[token] for token in kept)
    upto = 0.0
    for token in kept:
        upto += weights[token]
        if upto > target:
            return token
    return kept[-1]


COMBINATIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.3},
    {"temperature": 2.0},
    {"top_k": 1},
    {"top_k": 17},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 0.1},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 0.8},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6, "temperature": 0.0},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.8, "top_p": 0.9},
    {"presence_penalty": -1.0, "frequency_penalty": -0.5, "temperature": 0.0},
    {"logit_bias": {7: 8.0, 9: -100.0}},
    {"logit_bias": {12: 6.0}, "repetition_penalty": 1.3, "frequency_penalty": 1.0, "temperature": 0.0},
    {"min_tokens": 6, "stop_token_ids": (1, 2, 3)},
    {"min_tokens": 5, "stop_token_ids": (1, 2, 3)},
]


@pytest.mark.parametrize("params", COMBINATIONS, ids=str)
def test_each_parameter_does_what_the_reference_does(params: dict[str, Any]) -> None:
    for seed in range(25):
        logits_TV = some_logits(seed)
        row = a_row(seed=seed, **params)
        assert sample(logits_TV, [row])[0].token_id == reference_token(logits_TV[0].tolist(), row)


def test_all_kinds_of_rows_together_give_what_each_gives_alone() -> None:
    rows = [a_row(seed=at, logprobs=at % 4, **params) for at, params in enumerate(COMBINATIONS)]
    logits_TV = some_logits(1, rows=len(rows))
    alone = [sample(logits_TV[at : at + 1], [row])[0] for at, row in enumerate(rows)]
    assert sample(logits_TV, rows) == alone
    backwards = sample(logits_TV.flip(0), rows[::-1])
    assert backwards[::-1] == alone


@pytest.mark.parametrize("temperature", [1e-30, 1e-44, 1e-46, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_temperature_that_float32_cannot_tell_from_zero_is_greedy(temperature: float, top_p: float) -> None:
    logits_TV = some_logits(rows=2)
    neighbour = a_row(temperature=1.0, top_p=0.7, seed=3)
    rows = [a_row(temperature=temperature, top_p=top_p), neighbour]
    results = sample(logits_TV, rows)
    assert results[0].token_id == int(logits_TV[0].argmax())
    assert results[1] == sample(logits_TV[1:], [neighbour])[0]


def test_the_logits_stay_as_they_are() -> None:
    logits_TV = some_logits(2, rows=len(COMBINATIONS))
    before_TV = logits_TV.clone()
    sample(logits_TV, [a_row(**params) for params in COMBINATIONS])
    assert torch.equal(logits_TV, before_TV)


def test_half_precision_logits_are_drawn_from_as_float32() -> None:
    logits_TV = some_logits(3).bfloat16()
    row = a_row(top_p=0.9, seed=5, logprobs=3)
    assert sample(logits_TV, [row]) == sample(logits_TV.float(), [row])


@given(seed=st.integers(-(2**70), 2**70), index=st.integers(0, 10**6))
def test_a_uniform_number_lies_in_the_unit_interval(seed: int, index: int) -> None:
    assert 0.0 <= uniform(seed, index) < 1.0


def test_uniform_numbers_are_spread_evenly_and_differ_by_seed_and_index() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert len(set(numbers)) == len(numbers)
    counts = Counter(int(number * 10) for number in numbers)
    assert all(abs(counts[tenth] - 1000) < 150 for tenth in range(10))


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.2}, {"temperature": 0.5}])
def test_tokens_come_as_often_as_the_distribution_says(params: dict[str, Any]) -> None:
    logits_V = torch.tensor([1.0, 2.0, 0.0, 1.5, -1.0, 0.5])
    count = 4000
    rows = [SamplingRow(SamplingParams(seed=seed, **params), NONE, []) for seed in range(count)]
    drawn = Counter(result.token_id for result in sample(logits_V.expand(count, -1), rows))
    fine = [SamplingRow(SamplingParams(seed=seed, **params), NONE, [1]) for seed in range(count)]
    expected = Counter(reference_token(logits_V.tolist(), row) for row in fine)
    assert drawn.keys() == expected.keys()
    assert all(abs(drawn[token] - expected[token]) < 5 * math.sqrt(2 * count / 4) for token in drawn)


def test_the_next_output_token_has_another_number() -> None:
    logits_TV = torch.zeros(1, VOCAB)
    drawn = [sample(logits_TV, [a_row(seed=1, output=[0] * at)])[0].token_id for at in range(20)]
    assert len(set(drawn)) > 10


@pytest.mark.parametrize(
    ("value", "words"), [(math.nan, "not numbers"), (math.inf, "infinite"), (-math.inf, "no token is left")]
)
def test_a_row_without_sound_logits_fails_alone(value: float, words: str) -> None:
    logits_TV = some_logits(4, rows=3)
    rows = [a_row(seed=at, top_p=0.9, logprobs=1) for at in range(3)]
    sound = sample(logits_TV, rows)
    logits_TV[1, 100 if value != -math.inf else slice(None)] = value
    broken = sample(logits_TV, rows)
    assert words in (broken[1].error_message or "")
    assert (broken[1].token_id, broken[1].logprobs) == (None, None)
    assert [broken[0], broken[2]] == [sound[0], sound[2]]


def test_a_row_whose_whole_vocabulary_is_masked_fails_with_words() -> None:
    row = a_row(min_tokens=100, stop_token_ids=tuple(range(VOCAB)))
    assert "no token is left" in (sample(some_logits(), [row])[0].error_message or "")


def test_tokens_outside_the_vocabulary_are_passed_over() -> None:
    row = a_row(temperature=0.0, logit_bias={10**6: 5.0, 4: 90.0}, min_tokens=9, stop_token_ids=(10**6, 4))
    unbiased = a_row(temperature=0.0, min_tokens=9, stop_token_ids=(4,))
    assert sample(some_logits(), [row])[0] == sample(some_logits(), [unbiased])[0]


def test_no_rows_give_no_results() -> None:
    assert sample(torch.empty(0, VOCAB), []) == []


@pytest.mark.usefixtures("two_threads")
def test_logprobs_are_the_same_bits_alone_and_beside_others() -> None:
    logits_TV = torch.randn(40, 49152, generator=torch.Generator().manual_seed(0)) * 3
    row = SamplingRow(SamplingParams(temperature=0.0, logprobs=2), NONE, [])
    together = [result.logprobs for result in sample(logits_TV, [row] * 40)]
    assert together == [sample(one_1V, [row])[0].logprobs for one_1V in logits_TV.split(1)]


def test_logprobs_are_raw_and_ranked() -> None:
    logits_TV = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    mass = math.log(1 + 2 * math.e**2 + math.e)
    row = SamplingRow(SamplingParams(temperature=0.0, logit_bias={3: 1.0}, logprobs=2), NONE, [])
    found = sample(logits_TV, [row])[0].logprobs
    assert found is not None
    assert (found.token_id, found.rank) == (3, 2)
    assert found.logprob == pytest.approx(2 - mass)
    assert found.top == ((1, pytest.approx(2 - mass)), (3, pytest.approx(2 - mass)))


@pytest.mark.parametrize(("asked", "given"), [(0, 0), (4, 4), (-1, VOCAB), (VOCAB + 5, VOCAB)])
def test_as_many_top_tokens_come_as_asked(asked: int, given: int) -> None:
    logits_TV = some_logits(6).round()
    found = sample(logits_TV, [a_row(logprobs=asked)])[0].logprobs
    assert found is not None
    logprobs = torch.log_softmax(logits_TV[0].double(), 0).tolist()
    expected = sorted(range(VOCAB), key=lambda token: (-logits_TV[0, token].item(), token))[:given]
    assert [token for token, _ in found.top] == expected
    assert [value for _, value in found.top] == pytest.approx(
        [logprobs[token] for token in expected], abs=1e-5
    )


def test_impossible_tokens_have_the_lowest_logprob_that_json_can_carry() -> None:
    logits_TV = torch.tensor([[0.0, -math.inf]])
    found = sample(logits_TV, [SamplingRow(SamplingParams(logprobs=-1), NONE, [])])[0].logprobs
    assert found is not None
    assert found.top == ((0, 0.0), (1, LOWEST_LOGPROB))


def test_prompt_tokens_are_scored_row_by_row() -> None:
    logits_NV = some_logits(7, rows=150).bfloat16()
    following = [(7 * at) % VOCAB for at in range(150)]
    found = prompt_logprobs(logits_NV, following, 3)
    logprobs_NV = torch.log_softmax(logits_NV.float(), 1)
    assert [score.token_id for score in found] == following
    for at in (0, 63, 64, 149):
        assert found[at].logprob == pytest.approx(logprobs_NV[at, following[at]].item(), abs=1e-5)
        better = (logprobs_NV[at] > logprobs_NV[at, following[at]]).sum().item()
        assert found[at].rank >= better + 1
        assert len(found[at].top) == 3


def test_the_seed_decides_and_nothing_else() -> None:
    logits_TV = some_logits(8)
    row = a_row(seed=11)
    again = replace(row, seen_token_ids=NONE)
    assert sample(logits_TV, [row]) == sample(logits_TV, [again])
