"""`Rotation` on a GPU: the rows of all adapters with few rows in one launch for each factor.

A program has one row and a tile of `LANES` entries of the turned vector, each a product of one row of a block
with the entries that the block couples; ``place`` says where those are, so nothing is dealt out or gathered
before. Blocks are read where they lie. The last factor leaves ``w (R v - v)`` at once, or R v for the base
product of a scaled rotation. An adapter with more rows gets the twin's products of its own, which read its
blocks once.

All in float32. Checked under Triton's interpreter and on an H200.

Legend: as in `timbre_server.operators.rotation`; P pairs of a row and a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_methods.program import Rotation
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.rotation import (
    RotationOperator,
    TurnedRows,
    Use,
    extra_scales,
    paired_rows,
    whole_blocks,
)
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton.launch import addresses
from timbre_server.operators.triton.row_uses import apart

MAX_ROWS = 16
"""Of one adapter, for which a launch reads its blocks once a row."""

LANES = tl.constexpr(64)

MAX_WIDTH = 64
"""Of what a program takes of a block's row at once."""


@triton.jit
def _place(entry, size, chunk):
    """Where entries, counted block after block, are in the vector: half a block in each half of a chunk."""
    block = entry % chunk // size
    half = entry % size // (size // 2)
    first = entry // chunk * chunk + half * (chunk // 2)
    return first + block * (size // 2) + entry % size % (size // 2)


@triton.jit
def _turned(
    v, v_rows, blocks_A, use_P, x, x_rows, weights_P, out, factor, num_features, stored, size, chunk,
    WIDTH: tl.constexpr, IS_DEALT: tl.constexpr, IS_CHANGE: tl.constexpr,
):  # fmt: skip
    """``out[p] = R v[v_rows[p]]`` for one factor; as a change, ``w (R v[..] - x[x_rows[p]])``."""
    pair = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * LANES + tl.arange(0, LANES)
    is_in = entry < num_features
    v += (pair if v_rows is None else tl.load(v_rows + pair)) * num_features
    blocks = tl.load(blocks_A + tl.load(use_P + pair)).to(tl.pointer_type(tl.float32))
    block = tl.where(stored > 1, entry // size, 0).to(tl.int64) + factor * stored
    block_row = blocks + (block * size + entry % size) * size
    products = tl.zeros((LANES, WIDTH), tl.float32)
    for first in range(0, size, WIDTH):
        column = first + tl.arange(0, WIDTH)
        is_one = is_in[:, None] & (column[None, :] < size)
        coupled = (entry // size * size)[:, None] + column[None, :]
        if IS_DEALT:
            coupled = _place(coupled, size, chunk)
        values = tl.load(v + coupled, is_one, 0.0).to(tl.float32)
        products += tl.load(block_row[:, None] + column[None, :], is_one, 0.0) * values
    turned = tl.sum(products, 1)
    place = _place(entry, size, chunk) if IS_DEALT else entry
    if IS_CHANGE:
        x += (pair if x_rows is None else tl.load(x_rows + pair)) * num_features
        before = tl.load(x + place, is_in, 0.0).to(tl.float32)
        turned = (turned - before) * tl.load(weights_P + pair)
    tl.store(out + pair * num_features + place, turned, is_in)


class TritonRotation(RotationOperator):
    def _is_paired(self, part: Rotation, num_rows: int, room: PoolRoom) -> bool:
        return num_rows <= MAX_ROWS

    def _paired(self, own: Sequence[Use], table: RowTable) -> TurnedRows:
        parts = [part for _, part in own]
        kept = [whole_blocks(part).contiguous() for part in parts]
        _, uses = apart([segment for segment, _ in own])
        return _Launches(
            *paired_rows(own, table),
            extra_scales(parts),
            use_P=uses.use_P,
            blocks=kept,
            blocks_A=addresses(kept, table.device),
            chunks=parts[0].chunks,
        )


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Launches(TurnedRows):
    """The scales are each adapter's once, whatever its rows."""

    use_P: Tensor
    blocks: Sequence[Tensor]
    blocks_A: Tensor
    chunks: tuple[int, ...]

    def turned(self, v_TD: Tensor) -> Tensor:
        return self._launched(v_TD, is_change=False)

    def change(self, v_TD: Tensor) -> Tensor:
        return self._launched(v_TD, is_change=True)

    def gain(self) -> Tensor:
        assert self.extra_scale_GO is not None
        return self.extra_scale_GO[self.use_P] * self.weights_N1

    def _launched(self, v_TD: Tensor, is_change: bool) -> Tensor:
        """One launch for each factor, the next of which reads what the one before wrote."""
        x_TD = v_TD.contiguous()
        num_pairs, num_features = len(self.rows_N), v_TD.shape[1]
        stored, size = self.blocks[0].shape[1:3]
        grid = (num_pairs, triton.cdiv(num_features, LANES.value))
        width = min(MAX_WIDTH, triton.next_power_of_2(size))
        source: Tensor = x_TD
        rows: Tensor | None = self.rows_N
        for factor, chunk in enumerate(self.chunks):
            out_PD = torch.empty(num_pairs, num_features, device=v_TD.device)
            is_last = factor == len(self.chunks) - 1
            _turned[grid](
                source, rows, self.blocks_A, self.use_P, x_TD, self.rows_N, self.weights_N1, out_PD, factor,
                num_features, stored, size, chunk,
                WIDTH=width, IS_DEALT=chunk > size, IS_CHANGE=is_change and is_last,
            )  # fmt: skip
            source, rows = out_PD, None
        return source
