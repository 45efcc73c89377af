"""Formulas of the floor and of the table, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import floor
import pytest
import torch
from floor import Machine, Weights, floor_tokens_per_s, measure, step_floor_s
from load import Figures
from scenarios import Scenario
from summary import first_errors, median, ratio_in_round, row

WEIGHTS = Weights([(10, 20), (20, 10)], (50, 20), itemsize=4)
SLOW_MEMORY = Machine(bytes_per_s=560.0, operations_per_s={1: 1e9, 4: 1e9, 512: 1e9})
SLOW_PRODUCTS = Machine(bytes_per_s=1e9, operations_per_s={1: 280.0, 4: 560.0, 512: 2800.0})


def round_of(tokens_per_s: float, errors: int = 0) -> Figures:
    times = (1.0, 2.0, 3.0)
    return Figures(tokens_per_s, times, times, times, errors, "a: broke" if errors else None)


def test_a_step_is_bound_by_reading_weights_or_by_multiplying_rows() -> None:
    assert WEIGHTS.num_bytes == 4 * 1400
    assert WEIGHTS.operations(rows=3, kept_rows=2) == 2 * (3 * 400 + 2 * 1000)
    assert step_floor_s(WEIGHTS, SLOW_MEMORY, 4, 4) == 10
    assert step_floor_s(WEIGHTS, SLOW_PRODUCTS, 4, 4) == 4 * 2800 / 560


def test_the_most_tokens_a_second_of_each_kind() -> None:
    four = Scenario("decode", 4)
    assert floor_tokens_per_s(four, WEIGHTS, SLOW_MEMORY, 32) == 4 / 10
    prefill = Scenario("prefill", 4, prompt_tokens=(512,))
    assert floor_tokens_per_s(prefill, WEIGHTS, SLOW_PRODUCTS, 1) == pytest.approx(
        512 / ((512 * 800 + 2000) / 2800)
    )
    mixed = Scenario("mixed", 4, prompt_tokens=(10, 30))
    written, read, steps = 8 * 5, 8 * 20, 8 * 5 / 4
    assert floor_tokens_per_s(mixed, WEIGHTS, SLOW_MEMORY, 5) == pytest.approx(written / (steps * 10))
    operations = (read + written - 8) * 800 + written * 2000
    assert floor_tokens_per_s(mixed, WEIGHTS, SLOW_PRODUCTS, 5) == pytest.approx(
        written / (operations / 2800)
    )


def test_a_machine_is_measured_for_each_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "BUDGET_S", 0.0)
    monkeypatch.setattr(floor, "COPY_BYTES", 1 << 20)
    found = measure(WEIGHTS, [4, 1, 4], torch.float32, torch.device("cpu"))
    assert list(found.operations_per_s) == [1, 4]
    assert min(found.bytes_per_s, *found.operations_per_s.values()) > 0


def test_a_ratio_is_taken_inside_a_round() -> None:
    own, base = [round_of(10), round_of(4), round_of(30)], [round_of(20), round_of(5), round_of(40)]
    assert ratio_in_round(own, base) == 0.75
    assert ratio_in_round(own, base) != median([10, 4, 30]) / median([20, 5, 40])


def test_a_row_has_ratios_and_errors_and_says_where_there_is_no_figure() -> None:
    found = row("x", [round_of(8), round_of(12, errors=2)], [round_of(16), round_of(24)], 30.0)
    assert (found["tokens/s"], found["to base"], found["x floor"], found["errors"]) == (
        "10.0",
        "0.500",
        "3.00",
        2,
    )
    assert found["TTFT, ms: p50 / p90 / p99"] == "1 / 2 / 3"
    nothing = Figures(math.nan, (math.nan,) * 3, (math.nan,) * 3, (math.nan,) * 3, 1, "a: broke")
    assert row("x", [nothing], [round_of(1)], None)["tokens/s"] == "–"
    assert first_errors({"x": [round_of(1), nothing], "y": [round_of(1)]}) == {"x": "a: broke"}
