"""`Sparse` in Triton: ``y[o] += Σ w · Σ_k values[k] x[columns[k]]``, k over row o of a matrix in CSR.

A program has up to 8 rows of the same adapters and 16 outputs; it reads the coefficients of these outputs 32
at a time, side by side, once for all of its rows, and gathers x for each. A row of a matrix may have any
length: a block takes as many turns as its longest. Mixes are rows with several matrices. No matrix is
copied, no atomics are used, and an output is written once.

Checked under Triton's interpreter and on an H200.

Legend: T rows of the batch, Q rows of the crowds of one launch, I in, O out; inside the kernel N rows of a
tile, O outputs of a block, K coefficients of one output at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from timbre_methods.program import Sparse
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.sparse import SparseOperator
from timbre_server.operators.triton.crowds import Crowd, CrowdRows, Outputs, crowds_of
from timbre_server.operators.triton.launch import addresses, numbers

MIN_ROWS_OF_TILES = 4
TILE_ROWS = 8
OUT = 16
WIDTH = 32

TILE = tl.constexpr(5)
"""Numbers of a tile: first row, rows, first matrix, matrices, member."""
MATRIX = tl.constexpr(3)
"""Addresses of a matrix: row ends, columns, values."""


@triton.jit(do_not_specialize=["num_rows_Q"])
def gather_rows(
    x: tl.tensor,
    in_features: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    num_rows_Q: tl.tensor,
    tiles: tl.tensor,
    matrices: tl.tensor,
    pairs: tl.tensor,
    members: tl.tensor,
    places: tl.tensor,
    y: tl.tensor,
    ROWS: tl.constexpr,
    OUT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0) * TILE
    n, o, k = tl.arange(0, ROWS), tl.program_id(1) * OUT + tl.arange(0, OUT), tl.arange(0, WIDTH)
    q_N, is_row = tl.load(tile) + n, n < tl.load(tile + 1)
    first_matrix, member = tl.load(tile + 2), tl.load(tile + 4)
    out_features = tl.load(members + member * 2 + 1)
    is_out = o < out_features
    num_matrices = tl.where(tl.program_id(1) * OUT < out_features, tl.load(tile + 3), 0)
    x_N = x + tl.load(rows + q_N, mask=is_row, other=0).to(tl.int64) * in_features

    y_NO = tl.zeros((ROWS, OUT), tl.float32)
    for m in range(first_matrix, first_matrix + num_matrices):
        row_ends = tl.load(matrices + m * MATRIX).to(tl.pointer_type(tl.int64))
        columns = tl.load(matrices + m * MATRIX + 1).to(tl.pointer_type(tl.int32))
        values = tl.load(matrices + m * MATRIX + 2).to(tl.pointer_type(tl.float32))
        weight_N = tl.load(weights + tl.load(pairs + m) * num_rows_Q + q_N, mask=is_row, other=0.0)
        start_O = tl.load(row_ends + o, mask=is_out, other=0)
        end_O = tl.load(row_ends + o + 1, mask=is_out, other=0)
        longest = tl.max(end_O - start_O, axis=0).to(tl.int32)
        products_NOK = tl.zeros((ROWS, OUT, WIDTH), tl.float32)
        for first in range(0, longest, WIDTH):
            at_OK = start_O[:, None] + first + k[None, :]
            is_stored = at_OK < end_O[:, None]
            column_OK = tl.load(columns + at_OK, mask=is_stored, other=0)
            value_OK = tl.load(values + at_OK, mask=is_stored, other=0.0)
            is_read = is_row[:, None, None] & is_stored[None, :, :]
            x_NOK = tl.load(x_N[:, None, None] + column_OK[None, :, :], mask=is_read, other=0.0)
            products_NOK += value_OK[None, :, :] * x_NOK.to(tl.float32)
        y_NO += weight_N[:, None] * tl.sum(products_NOK, axis=2)
    place_N = tl.load(places + member * num_rows_Q + q_N, mask=is_row, other=0).to(tl.int64)
    y_N = y + tl.load(members + member * 2) + place_N * out_features
    tl.store(y_N[:, None] + o[None, :], y_NO, mask=is_row[:, None] & is_out[None, :])


class TritonSparse(SparseOperator):
    def bind(self, uses: Uses[Sparse], table: RowTable) -> Bound:
        return _BoundSparse(uses, table)


class _BoundSparse(Bound):
    """Keeps the parts whose addresses it holds."""

    def __init__(self, uses: Uses[Sparse], table: RowTable) -> None:
        self._parts: list[Mapping[int, Sequence[Sparse]]] = [
            {slot: parts_by_slot[slot] for slot in table.slots if parts_by_slot.get(slot)}
            for parts_by_slot in uses
        ]
        shapes = [
            [len(part.row_ends) - 1 for own in by_slot.values() for part in own] for by_slot in self._parts
        ]
        self._outputs = Outputs(table, self._parts, [max(own, default=0) for own in shapes])
        by_height: dict[int, list[Crowd]] = {}
        for crowd in crowds_of(table, {slot for by_slot in self._parts for slot in by_slot}):
            height = TILE_ROWS if crowd.num_rows >= MIN_ROWS_OF_TILES else 1
            by_height.setdefault(height, []).append(crowd)
        self._launches = [
            _Launch.of(crowds, height, self._parts, self._outputs, table)
            for height, crowds in by_height.items()
        ]

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        y = self._outputs.empty()
        for launch in self._launches:
            launch(x_TI, y)
        return self._outputs.changes(y)


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Crowds whose tiles have one height, at all members."""

    height: int
    rows: CrowdRows
    tiles: Tensor
    matrices: Tensor
    pairs: Tensor
    outputs: Outputs
    places_GQ: Tensor

    @staticmethod
    def of(
        crowds: Sequence[Crowd],
        height: int,
        parts: Sequence[Mapping[int, Sequence[Sparse]]],
        outputs: Outputs,
        table: RowTable,
    ) -> _Launch:
        tiles: list[tuple[int, ...]] = []
        matrices: list[Tensor] = []
        pairs: list[int] = []
        first_row = 0
        for crowd in crowds:
            for member, by_slot in enumerate(parts):
                first_matrix = len(pairs)
                for pair, slot in enumerate(crowd.slots):
                    for part in by_slot.get(slot, ()):
                        matrices += [part.row_ends, part.columns_N, part.values_N]
                        pairs.append(pair)
                own = first_matrix, len(pairs) - first_matrix, member
                if own[1]:
                    tiles += [(first_row + row, count, *own) for row, count in crowd.tiles(height)]
            first_row += crowd.num_rows
        device = table.device
        rows, places = CrowdRows(crowds, device), outputs.places(crowds)
        return _Launch(
            height,
            rows,
            numbers(tiles, device),
            addresses(matrices, device),
            numbers(pairs, device),
            outputs,
            places,
        )

    def __call__(self, x_TI: Tensor, y: Tensor) -> None:
        gather_rows[len(self.tiles), triton.cdiv(self.outputs.widest, OUT)](
            x_TI, x_TI.shape[1], self.rows.rows_Q, self.rows.weights_KQ, self.rows.num_rows, self.tiles,
            self.matrices, self.pairs, self.outputs.members_G2, self.places_GQ, y,
            ROWS=self.height, OUT=OUT, WIDTH=WIDTH,
        )  # fmt: skip
