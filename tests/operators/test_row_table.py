"""What a row table makes of spans; what operators make of tables is held in test_operators.py."""

from __future__ import annotations

import pytest

from timbre_server.operators.row_table import RowTable, Span


def test_a_span_has_each_slot_once() -> None:
    with pytest.raises(AssertionError, match="occurs twice"):
        Span(1, ((3, 0.5), (1, 1.0), (3, 0.5)))


def test_a_segment_has_each_row_of_its_adapter_once() -> None:
    table = RowTable([Span(2, ((0, 0.5), (1, 1.0))), Span(1), Span(1, ((0, 2.0),))])

    found = {
        segment.slot: (segment.rows_N.tolist(), segment.weights_N.tolist()) for segment in table.segments
    }

    assert found == {0: ([0, 1, 3], [0.5, 0.5, 2.0]), 1: ([0, 1], [1.0, 1.0])}


def test_rows_are_found_by_their_mix_of_some_slots() -> None:
    table = RowTable(
        [
            Span(2, ((0, 0.5), (1, 1.0))),
            Span(1),
            Span(1, ((1, 1.0), (2, 3.0), (0, 0.5))),
            Span(2, ((2, 1.0),)),
            Span(1, ((0, 0.25),)),
        ]
    )
    found = {mix: rows_N.tolist() for mix, rows_N in table.by_mix((0, 1)).items()}
    assert found == {
        ((0, 0.5), (1, 1.0)): [0, 1, 3],
        (): [2, 4, 5],
        ((0, 0.25),): [6],
    }
    assert {mix: rows_N.tolist() for mix, rows_N in table.by_mix(()).items()} == {(): list(range(7))}
