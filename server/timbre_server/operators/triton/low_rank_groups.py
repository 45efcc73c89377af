"""Low-rank factors of all rows of a step at one group, as tables for the kernels of `low_rank_kernels`.

Crowds of few rows (decode) go by the row, their input cut in pieces of one length, so that a row's sum has
one order whatever its neighbours; crowds of many rows (prefill) go by tiles of rows.

Legend: T rows of the batch, Q rows of the crowds of one launch, U rows of one member's output, I in, O out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.formats import format_of, formats_in
from timbre_server.operators.contract import Change
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton import low_rank_kernels as kernels
from timbre_server.operators.triton.crowds import Crowd, CrowdRows, Outputs, counts, crowds_of
from timbre_server.operators.triton.launch import Precision, numbers

MIN_ROWS_OF_TILES = 8
"""From this many rows on, a crowd's factors are read once for a tile instead of once for a row."""
MIN_ROWS_OF_TALL_TILES = 256


@dataclass(frozen=True, slots=True)
class Tiling:
    """``piece``: how much of the input a program of the shrink sums; None: all of it."""

    rows: int
    ranks: int
    width: int
    out: int
    piece: int | None = None


BY_ROW = Tiling(rows=1, ranks=16, width=256, out=256, piece=512)
BY_TILE = Tiling(rows=16, ranks=16, width=64, out=64)
BY_TALL_TILE = Tiling(rows=64, ranks=32, width=32, out=64)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One part of an adapter at one member, and the column of its gate among the adapter's."""

    part: LowRank
    member: int
    gate: int = 0


FactorsBySlot = Mapping[int, Sequence[Factor]]


@dataclass(frozen=True, slots=True)
class GateRows:
    """Where the gates of each adapter's rows lie among those of all: ``start + width · n`` for its row n.

    ``by_row``: adapters of which so few experts act on a row that it reads its own, even beside other rows.
    """

    starts: Mapping[int, int]
    widths: Mapping[int, int]
    by_row: Collection[int]


class LowRankGroups:
    """Ready for one table. Keeps the parts whose addresses it holds."""

    def __init__(
        self,
        factors: FactorsBySlot,
        num_members: int,
        table: RowTable,
        gate_rows: GateRows | None = None,
        precision: Precision = "ieee",
    ) -> None:
        factors = _with_contiguous_parts(factors)
        every = [(slot, factor) for slot, own in factors.items() for factor in own]
        self._parts = [factor.part for _, factor in every]
        widths = {factor.member: len(factor.part.b_OR) for _, factor in every}
        self._outputs = Outputs(
            table,
            [{slot for slot, factor in every if factor.member == member} for member in range(num_members)],
            [widths.get(member, 0) for member in range(num_members)],
        )
        by_tiling: dict[Tiling, list[Crowd]] = {}
        for crowd in crowds_of(table, factors):
            by_tiling.setdefault(_tiling(crowd, gate_rows), []).append(crowd)
        self._launches = [
            _Launch.of(crowds, factors, tiling, self._outputs, gate_rows, precision)
            for tiling, crowds in by_tiling.items()
        ]

    def sums(self, x_TI: Tensor, gates: Tensor | None = None) -> list[list[Change]]:
        """As `Bound.sums`. ``gates`` of all rows, flat, where `GateRows` says."""
        x_TI = x_TI.contiguous()
        y = self._outputs.empty()
        for launch in self._launches:
            launch(x_TI, y, gates)
        return self._outputs.changes(y)


def _with_contiguous_parts(factors: FactorsBySlot) -> FactorsBySlot:
    return {
        slot: [
            Factor(LowRank(f.part.a_RI.contiguous(), f.part.b_OR.contiguous()), f.member, f.gate) for f in own
        ]
        for slot, own in factors.items()
    }


def _tiling(crowd: Crowd, gate_rows: GateRows | None) -> Tiling:
    count = crowd.num_rows
    if count < MIN_ROWS_OF_TILES or (gate_rows and any(slot in gate_rows.by_row for slot in crowd.slots)):
        return BY_ROW
    return BY_TILE if count < MIN_ROWS_OF_TALL_TILES else BY_TALL_TILE


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """What programs are told, laid out as `low_rank_kernels` says, and how much z they need."""

    shrink_tiles: Tensor
    a_ranks: Tensor
    is_aligned: bool
    ranks: Tensor
    a_formats: int
    expand_tiles: Tensor
    factors: Tensor
    b_factors: Tensor
    b_formats: int
    z_size: int

    @staticmethod
    def of(crowds: Sequence[Crowd], factors: FactorsBySlot, tiling: Tiling, device: torch.device) -> _Tables:
        lists = _Lists([], [], [], [])
        first_row = first_rank = z_size = 0
        for crowd in crowds:
            own = [(pair, factor) for pair, slot in enumerate(crowd.slots) for factor in factors[slot]]
            num_ranks = sum(len(factor.part.a_RI) for _, factor in own)
            places = _Places(first_row, first_rank, num_ranks, z_size, tuple(crowd.tiles(tiling.rows)))
            lists.add(own, places, tiling)
            first_row += crowd.num_rows
            first_rank += num_ranks
            z_size += crowd.num_rows * num_ranks
        starts, strides, ranks, pairs, gates, formats = (
            torch.tensor(column) for column in zip(*lists.shrinks, strict=True)
        )
        a_ranks = (starts.repeat_interleave(ranks) + strides.repeat_interleave(ranks) * counts(ranks)).to(
            device
        )
        return _Tables(
            numbers(lists.shrink_tiles, device),
            a_ranks,
            not bool(((starts | strides) % 16).any()),
            torch.stack([pairs, gates, formats], 1).repeat_interleave(ranks, 0).to(device, torch.int32),
            formats_in(own[5] for own in lists.shrinks),
            numbers(lists.expand_tiles, device),
            numbers([own[:5] for own in lists.expands], device),
            torch.tensor([own[5] for own in lists.expands], device=device),
            formats_in(own[4] for own in lists.expands),
            z_size,
        )


class _Places(NamedTuple):
    """Where one crowd's rows, ranks and z begin, and its tiles: first row among its own, and rows."""

    first_row: int
    first_rank: int
    num_ranks: int
    first_z: int
    tiles: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class _Lists:
    """The tables, crowd after crowd. ``shrinks``: where a factor's A begins, bytes of a rank, ranks, for
    which of a row's adapters, with which gate, and its format. ``expands``: a factor, and where B begins."""

    shrink_tiles: list[tuple[int, ...]]
    shrinks: list[tuple[int, int, int, int, int, int]]
    expand_tiles: list[tuple[int, ...]]
    expands: list[tuple[int, int, int, int, int, int]]

    def add(self, own: Sequence[tuple[int, Factor]], places: _Places, tiling: Tiling) -> None:
        """Appends one crowd with its factors, each of one of a row's adapters."""
        first_row, first_rank, num_ranks, first_z, tiles = places
        by_member: dict[int, list[tuple[int, int, int, int, int, int]]] = {}
        column = 0
        for pair, factor in own:
            a_RI, b_OR = factor.part.a_RI, factor.part.b_OR
            rank, row_bytes = len(a_RI), a_RI.shape[1] * a_RI.element_size()
            self.shrinks.append((a_RI.data_ptr(), row_bytes, rank, pair, factor.gate, format_of(a_RI)))
            expand = rank, column, pair, factor.gate, format_of(b_OR), b_OR.data_ptr()
            by_member.setdefault(factor.member, []).append(expand)
            column += rank
        for row, count in tiles:
            z = first_z + row * num_ranks
            for rank in range(0, num_ranks, tiling.ranks):
                ranks = min(tiling.ranks, num_ranks - rank)
                self.shrink_tiles.append(
                    (first_row + row, count, first_rank + rank, ranks, z + rank, num_ranks)
                )
        for member, expands in by_member.items():
            run = len(self.expands), len(expands), member
            self.expands.extend(expands)
            self.expand_tiles.extend(
                (first_row + row, count, first_z + row * num_ranks, num_ranks, *run) for row, count in tiles
            )


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """Crowds of one tiling: one shrink and one expand, for all members."""

    tables: _Tables
    tiling: Tiling
    rows: CrowdRows
    outputs: Outputs
    places_GQ: Tensor
    gate_starts_KQ: Tensor | None
    precision: Precision

    @staticmethod
    def of(
        crowds: Sequence[Crowd],
        factors: FactorsBySlot,
        tiling: Tiling,
        outputs: Outputs,
        gate_rows: GateRows | None,
        precision: Precision,
    ) -> _Launch:
        device = outputs.members_G2.device
        rows = CrowdRows(crowds, device)
        return _Launch(
            _Tables.of(crowds, factors, tiling, device),
            tiling,
            rows,
            outputs,
            outputs.places(crowds),
            None if gate_rows is None else rows.numbered(gate_rows.starts, gate_rows.widths),
            precision,
        )

    def __call__(self, x_TI: Tensor, y: Tensor, gates: Tensor | None) -> None:
        tables, tiling, num_rows = self.tables, self.tiling, self.rows.num_rows
        in_features = x_TI.shape[1]
        piece = tiling.piece or in_features
        num_pieces = triton.cdiv(in_features, piece)
        z = torch.empty(num_pieces * tables.z_size, dtype=torch.float32, device=x_TI.device)
        gated = gates is not None
        kernels.shrink[len(tables.shrink_tiles), num_pieces](
            x_TI, in_features, self.rows.rows_Q, num_rows, tables.shrink_tiles, tables.a_ranks,
            tables.ranks, gates, self.gate_starts_KQ, z, tables.z_size, piece,
            ROWS=tiling.rows, RANKS=tiling.ranks, WIDTH=tiling.width,
            GATED=gated, FORMATS=tables.a_formats, ALIGNED=tables.is_aligned, PRECISION=self.precision,
        )  # fmt: skip
        kernels.expand[len(tables.expand_tiles), triton.cdiv(self.outputs.widest, tiling.out)](
            z, tables.z_size, num_pieces, self.rows.weights_KQ, num_rows, tables.expand_tiles,
            tables.factors, tables.b_factors, gates, self.gate_starts_KQ, self.outputs.members_G2,
            self.places_GQ, y,
            ROWS=tiling.rows, RANKS=tiling.ranks, OUT=tiling.out,
            GATED=gated, FORMATS=tables.b_formats, PRECISION=self.precision,
        )  # fmt: skip
