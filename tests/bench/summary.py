"""From the rounds of a run to its table: medians, and ratios that are taken inside a round.

A ratio of two medians would compare moments that a busy neighbour did not trouble alike; the median of each
round's own ratio does not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from load import Figures

LATENCIES = {"ttft_ms": "TTFT, ms", "itl_ms": "inter-token, ms", "e2e_ms": "end to end, ms"}


def median(values: Sequence[float]) -> float:
    """Of the numbers among them; NaN of none."""
    numbers = [value for value in values if not math.isnan(value)]
    return statistics.median(numbers) if numbers else math.nan


def ratio_in_round(own: Sequence[Figures], other: Sequence[Figures]) -> float:
    """The median over rounds of tokens/s to the other's in the same round."""
    return median([a.tokens_per_s / b.tokens_per_s for a, b in zip(own, other, strict=True)])


def row(
    name: str, rounds: Sequence[Figures], partner: Sequence[Figures], floor_tokens_per_s: float | None
) -> dict[str, Any]:
    """One line of the table. ``x floor`` is the time that was taken over the least that it can take."""
    tokens_per_s = median([each.tokens_per_s for each in rounds])
    found: dict[str, Any] = {
        "scenario": name,
        "tokens/s": shown(tokens_per_s, 1),
        "to base": shown(ratio_in_round(rounds, partner), 3),
        "x floor": "" if floor_tokens_per_s is None else shown(floor_tokens_per_s / tokens_per_s, 2),
    }
    for key, title in LATENCIES.items():
        by_share = zip(*(getattr(each, key) for each in rounds), strict=True)
        found[f"{title}: p50 / p90 / p99"] = " / ".join(shown(median(values), 0) for values in by_share)
    return found | {"errors": sum(each.errors for each in rounds)}


def shown(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def first_errors(rounds: Mapping[str, Sequence[Figures]]) -> dict[str, str]:
    """Of each scenario that had any, the first."""
    return {
        name: error
        for name, figures in rounds.items()
        for error in [next((f.first_error for f in figures if f.first_error), None)]
        if error
    }
