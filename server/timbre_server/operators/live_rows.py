"""The rows of whichever table runs, by adapter slot, where a kernel on a CPU reads them.

Who knows the address of a slot's rows need not be told when rows come and go: that is written here, once for
all layers.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection

import torch
from torch import Tensor

from timbre_server.operators.row_table import RowTable, Segment

_SLOTS = 64
"""Of one piece. Pieces stay where they are."""


class LiveRows:
    """Of each slot a structure of three integers of 64 bits: the address of its rows, that of their weights,
    and their number, which is 0 for slots that the table does not name."""

    def __init__(self) -> None:
        self._pieces: list[array[int]] = []
        self._segments: tuple[Segment, ...] = ()
        self.num_rows = 0
        """Of the table."""
        self._table: RowTable | None = None
        self._in_chunks = array("q", [0])
        self.in_chunks_address = self._in_chunks.buffer_info()[0]
        """Where the address of the table's ``in_chunks_T`` lies, or 0: it has no rows of chunks."""

    def show(self, table: RowTable) -> None:
        """Let it be the table's rows, which stay where they are while it does."""
        if table is self._table:
            return
        for segment in self._segments:
            self._write(segment.slot, (0, 0, 0))
        self._table, self._segments, self.num_rows = table, table.segments, table.num_rows
        for segment in self._segments:
            self._write(segment.slot, rows_fields(segment))
        self._in_chunks[0] = 0 if table.in_chunks_T is None else table.in_chunks_T.data_ptr()

    def address(self, slot: int) -> int:
        piece, number = self._place(slot)
        return piece.buffer_info()[0] + number * piece.itemsize

    def rows_of(self, slots: Collection[int]) -> Tensor:
        """Those of any of these slots, each once."""
        assert self._table is not None
        found = self._table.rows_using(slots)
        return torch.arange(self.num_rows) if found is None else found

    def _write(self, slot: int, fields: tuple[int, int, int]) -> None:
        piece, number = self._place(slot)
        piece[number : number + 3] = array("q", fields)

    def _place(self, slot: int) -> tuple[array[int], int]:
        while len(self._pieces) * _SLOTS <= slot:
            self._pieces.append(array("q", bytes(_SLOTS * 24)))
        return self._pieces[slot // _SLOTS], slot % _SLOTS * 3


def rows_fields(segment: Segment) -> tuple[int, int, int]:
    """``Rows`` of ``lanes.h``. Weights are read at each run: a router may have written them anew."""
    return segment.rows_N.data_ptr(), segment.weights_N.data_ptr(), segment.rows_N.shape[0]
