"""Rows of twelve adapters, 0 to 11, in the ways in which they meet in a batch."""

from timbre_server.operators.row_table import Span

CROWDS = {
    "one row": [Span(1, ((2, 1.0),))],
    "distinct": [Span(1, ((slot, 1.0),)) for slot in range(12)],
    "some of many": [Span(3), *(Span(1, ((slot, 1.0),)) for slot in (5, 0, 9)), Span(4)],
    "mixes": [Span(2, ((0, 0.7), (1, 0.3))), Span(1), Span(9, ((2, 0.25), (0, 2.0), (3, -0.5)))],
    "prefill": [Span(1, ((1, 1.0),)), Span(38, ((2, 1.0),)), Span(1), Span(21, ((0, 0.5),))],
}
