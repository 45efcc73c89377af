"""What a run consists of: combinations, popularity, sizes of requests."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from random_adapters import FAMILIES
from run import arguments, chosen, families_in_one
from scenarios import Matrix, Scenario, jobs, picked, useful_counts, zipf_weights

POOL = [f"lora-{i}" for i in range(32)]
NAMES = {"base": ["m"], "lora": POOL}
SIXTEEN = Scenario("decode", 16, "lora", 32)


def test_zipf_asks_the_first_twice_as_often_as_the_second() -> None:
    assert zipf_weights(4) == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    many = Scenario("decode", 20_000, "lora", 4, "zipf")
    counts = Counter(picked(POOL, many, random.Random(0), 0))
    assert set(counts) == set(POOL[:4])
    assert counts["lora-0"] / counts["lora-1"] == pytest.approx(2, rel=0.1)
    assert counts["lora-0"] / counts["lora-3"] == pytest.approx(4, rel=0.1)


def test_uniform_asks_each_as_often_and_others_of_a_large_pool_in_the_next_round() -> None:
    eight = Counter(picked(POOL, replace(SIXTEEN, adapters=8), random.Random(0), 0))
    assert eight == Counter(dict.fromkeys(POOL[:8], 2))
    first, second = (set(picked(POOL, SIXTEEN, random.Random(0), round_)) for round_ in (0, 1))
    assert len(first) == 16
    assert first | second == set(POOL)


def test_counts_that_so_few_requests_cannot_tell_apart_are_left_out() -> None:
    assert useful_counts((1, 8, 32), 1) == [1]
    assert useful_counts((32, 8, 1), 16) == [1, 8, 32]
    assert useful_counts((32,), 1) == [32]
    assert useful_counts((0,), 16) == []


def test_a_matrix_has_every_combination_once_and_each_partner() -> None:
    matrix = Matrix("decode", (1, 16), (1, 32), ("lora", "all"), ("uniform", "zipf"), (64, 512))
    found = list(matrix.scenarios())
    assert len(found) == len({each.name for each in found}) == 2 * (1 + 2) + 2 * (1 + 2 * (1 + 2))
    assert {each.partner for each in found} <= set(found)


def test_a_mixed_load_takes_prompts_in_turn_and_decode_outlasts_all_prompts() -> None:
    mixed = jobs(Scenario("mixed", 2, prompt_tokens=(4, 9)), NAMES, new_tokens=5, vocab_size=500, round_=0)
    assert [[len(job.prompt) for job in stream] for stream in mixed] == [[4, 4], [9, 9]]
    long = Scenario("decode", 8, prompt_tokens=(512,))
    assert {
        job.new_tokens
        for stream in jobs(long, NAMES, new_tokens=5, vocab_size=500, round_=0)
        for job in stream
    } == {13}


def test_no_two_requests_of_a_run_have_the_same_prompt() -> None:
    both = [SIXTEEN, SIXTEEN.partner]
    found = [
        job.prompt
        for round_ in (0, 1)
        for each in both
        for stream in jobs(each, NAMES, new_tokens=4, vocab_size=500, round_=round_)
        for job in stream
    ]
    assert len(set(found)) == len(found) == 64


def test_flags_replace_parts_of_the_chosen_size() -> None:
    found = chosen(
        arguments(["--scenarios", "decode", "--streams", "8", "--families", "ia3", "--adapters", "1,8"])
    )
    assert [each.name for each in found] == [
        "decode, 8 x 64: base",
        "decode, 8 x 64: ia3, 1 uniform",
        "decode, 8 x 64: ia3, 8 uniform",
    ]
    assert {each.kind for each in chosen(arguments(["--full"]))} == {"decode", "prefill", "mixed"}
    with pytest.raises(SystemExit, match="found adalora, expected some of lora"):
        chosen(arguments(["--families", "adalora"]))


def test_all_are_the_families_that_are_named_or_else_every_one() -> None:
    assert families_in_one("shira,lora,all") == ("lora", "shira")
    assert families_in_one("all") == families_in_one(None) == tuple(FAMILIES)
