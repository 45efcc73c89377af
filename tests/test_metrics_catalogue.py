"""The catalogue of metrics: names and buckets that stand nowhere else."""

from __future__ import annotations

from timbre_server.metrics_catalogue import COUNTERS, histograms, one_two_five


def test_lengths_have_buckets_up_to_the_longest_sequence() -> None:
    assert one_two_five(256) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert one_two_five(1000) == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def test_a_name_is_a_counters_or_a_histograms() -> None:
    assert COUNTERS.keys() & histograms(256).keys() == set()


def test_buckets_ascend() -> None:
    for name, spec in histograms(4096).items():
        assert list(spec.buckets) == sorted(set(spec.buckets)), name
