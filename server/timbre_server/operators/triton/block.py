"""`Block` on a GPU: dense blocks on some channels, for all adapters with few rows in one launch a side.

``input``: a program has one row and `OUTPUTS` outputs, gathers the channels of each of the row's blocks, and
sums the mix before it writes. ``output``: a program has one (row, part) pair and `CHANNELS` of its channels,
walks along the inputs, and writes where the channels are; all other outputs are zero. Blocks of any sizes run
together, read where they lie. An adapter with more rows gets the twin's product of its own, which reads its
block once.

All in float32. Checked under Triton's interpreter and on an H200.

Legend: as in `timbre_server.operators.block`; R rows of a launch, A uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from timbre_methods.program import Block
from timbre_server.operators.block import BlockOperator
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.row_table import RowTable, Segment
from timbre_server.operators.triton.launch import addresses, numbers
from timbre_server.operators.triton.row_uses import RowUses, apart, by_row, divided

MAX_ROWS = 16
"""Of one adapter, for which a launch reads its block once a row."""

OUTPUTS = tl.constexpr(64)
CHANNELS = tl.constexpr(16)
INNER = tl.constexpr(64)


class Blocks(NamedTuple):
    """Of each use: the addresses of its block and index, and how many channels they have."""

    block_A: Tensor
    index_A: Tensor
    size_A: Tensor


@triton.jit
def _from_channels(x, rows, x_stride, uses, blocks, y, num_outputs):
    """``y[r] = Σ w S x[rows[r], index]``."""
    r = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x += (r if rows is None else tl.load(rows + r)) * x_stride
    total = tl.zeros((OUTPUTS,), tl.float32)
    for pair in range(tl.load(uses.starts + r), tl.load(uses.starts + r + 1)):
        use = tl.load(uses.use_P + pair)
        block = tl.load(blocks.block_A + use).to(tl.pointer_type(tl.float32))
        index = tl.load(blocks.index_A + use).to(tl.pointer_type(tl.int64))
        size = tl.load(blocks.size_A + use)
        products = tl.zeros((OUTPUTS, INNER), tl.float32)
        for first in range(0, size, INNER):
            n = first + tl.arange(0, INNER)
            values = tl.load(x + tl.load(index + n, n < size, 0), n < size, 0.0).to(tl.float32)
            is_in = (o[:, None] < num_outputs) & (n[None, :] < size)
            s = tl.load(block + o.to(tl.int64)[:, None] * size + n[None, :], is_in, 0.0)
            products += s * values[None, :]
        total += tl.load(uses.weights_P + pair) * tl.sum(products, 1)
    tl.store(y + r * num_outputs + o, total, o < num_outputs)


@triton.jit
def _to_channels(x, rows, x_stride, uses, blocks, y, num_outputs, num_inputs):
    """``y[p, index] = w S x[rows[p]]``, where every row has one pair."""
    pair = tl.program_id(0).to(tl.int64)
    use = tl.load(uses.use_P + pair)
    block = tl.load(blocks.block_A + use).to(tl.pointer_type(tl.float32))
    index = tl.load(blocks.index_A + use).to(tl.pointer_type(tl.int64))
    size = tl.load(blocks.size_A + use)
    n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    x += tl.load(rows + pair) * x_stride
    products = tl.zeros((CHANNELS, INNER), tl.float32)
    if tl.program_id(1) * CHANNELS < size:
        for first in range(0, num_inputs, INNER):
            i = first + tl.arange(0, INNER)
            values = tl.load(x + i, i < num_inputs, 0.0).to(tl.float32)
            is_in = (n[:, None] < size) & (i[None, :] < num_inputs)
            s = tl.load(block + n.to(tl.int64)[:, None] * num_inputs + i[None, :], is_in, 0.0)
            products += s * values[None, :]
    total = tl.load(uses.weights_P + pair) * tl.sum(products, 1)
    tl.store(y + pair * num_outputs + tl.load(index + n, n < size, 0), total, n < size)


class TritonBlock(BlockOperator):
    def bind(self, uses: Uses[Block], table: RowTable) -> Bound:
        own, others = divided(uses, table, lambda part, num_rows: num_rows <= MAX_ROWS)
        if not any(own):
            return super().bind(others, table)
        bound = BoundBlocks(own, table)
        return JoinedSums([bound, super().bind(others, table)]) if any(others) else bound


class BoundBlocks(Bound):
    def __init__(self, uses: Uses[Block], table: RowTable) -> None:
        self._members = [_launches(parts_by_slot, table) for parts_by_slot in uses]

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        return [[launch.change(x_TI) for launch in launches] for launches in self._members]


@dataclass(frozen=True, slots=True, eq=False)
class _Launch:
    """All blocks of one side at a member."""

    parts: Sequence[Block]
    kept: Sequence[Tensor]
    rows_R: Tensor | None
    uses: RowUses
    blocks: Blocks

    @staticmethod
    def of(own: Sequence[tuple[Segment, Block]], table: RowTable) -> _Launch:
        parts = [part for _, part in own]
        blocks = [part.block.contiguous() for part in parts]
        indices = [part.index_N.contiguous() for part in parts]
        segments = [segment for segment, _ in own]
        rows_R, uses = by_row(segments, table) if parts[0].side == "input" else apart(segments)
        sizes = numbers([len(index_N) for index_N in indices], table.device)
        table_of = Blocks(addresses(blocks, table.device), addresses(indices, table.device), sizes)
        return _Launch(parts, [*blocks, *indices], rows_R, uses, table_of)

    def change(self, x_TI: Tensor) -> Change:
        first, num_rows = self.parts[0], len(self.uses.starts) - 1
        arguments = self.rows_R, x_TI.stride(0), self.uses, self.blocks
        if first.side == "input":
            y_RO = torch.empty(num_rows, first.out_features, device=x_TI.device)
            grid = (num_rows, triton.cdiv(first.out_features, OUTPUTS.value))
            _from_channels[grid](x_TI, *arguments, y_RO, first.out_features)
        else:
            y_RO = torch.zeros(num_rows, first.out_features, device=x_TI.device)
            most = max(len(part.index_N) for part in self.parts)
            grid = (num_rows, triton.cdiv(most, CHANNELS.value))
            _to_channels[grid](x_TI, *arguments, y_RO, first.out_features, x_TI.shape[1])
        return Change(y_RO, self.rows_R)


def _launches(parts_by_slot: Mapping[int, Sequence[Block]], table: RowTable) -> list[_Launch]:
    sides: dict[str, list[tuple[Segment, Block]]] = {}
    for segment in table.segments:
        for part in parts_by_slot.get(segment.slot, ()):
            sides.setdefault(part.side, []).append((segment, part))
    return [_Launch.of(own, table) for own in sides.values()]
