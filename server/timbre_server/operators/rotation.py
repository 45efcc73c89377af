"""`Rotation`: small blocks that turn the input or the base's output, one factor after the other.

An adapter with several rows, or without room for copies, gets batched products of its own. The others
(decode) run as (row, adapter) pairs, their blocks stacked, one batch for each shape that occurs: the blocks
of all pairs in one product.

Legend: T rows of the batch, N some of them, D features (in or out), I in, O out; G adapters that are turned
together and M rows of each, F factors, S stored blocks, B their size, K uses of one block in a vector.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from timbre_methods.program import Rotation
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, OwnProduct, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
"""From this many rows on, products of its own read an adapter's blocks once instead of once a row."""


MAX_STACKED_BLOCK = 64
"""Larger blocks are never copied side by side: their bytes in a vector's blocks grow with their size."""

Use = tuple[Segment, Rotation]


class RotationOperator(Operator[Rotation]):
    part = Rotation

    def meaning(self, part: Rotation, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        if part.side == "output":
            return Meaning(change_TO=_turned(part, y_TO) - y_TO)
        turned_TI = _turned(part, x_TI)
        own = None
        if part.scale_O is not None:
            own = OwnProduct(turned_TI, (part.scale_O - 1).expand_as(y_TO))
        return Meaning(input_change_TI=turned_TI - x_TI, own_product=own)

    def bind(self, uses: Uses[Rotation], table: RowTable) -> Bound:
        room = PoolRoom()
        return _BoundRotation(
            [self._batches(parts, "input", table, room) for parts in uses],
            [self._batches(parts, "output", table, room) for parts in uses],
        )

    def _batches(
        self, parts_by_slot: Mapping[int, Sequence[Rotation]], side: str, table: RowTable, room: PoolRoom
    ) -> list[TurnedRows]:
        batches: list[TurnedRows] = []
        pairs: dict[tuple[object, ...], list[Use]] = {}
        for segment in table.segments:
            for part in parts_by_slot.get(segment.slot, ()):
                if part.side != side:
                    continue
                if self._is_paired(part, len(segment.rows_N), room):
                    shape = (part.blocks_FSBB.shape, part.chunks, part.scale_O is None)
                    pairs.setdefault(shape, []).append((segment, part))
                else:
                    batches.append(_alone(segment, part))
        return [*batches, *(self._paired(own, table) for own in pairs.values())]

    def _is_paired(self, part: Rotation, num_rows: int, room: PoolRoom) -> bool:
        """Whether a part runs together with others like it."""
        is_small = num_rows < MIN_ROWS_ALONE and part.blocks_FSBB.shape[-1] <= MAX_STACKED_BLOCK
        return is_small and room.take(num_rows * 4 * part.blocks_FSBB.numel())

    def _paired(self, own: Sequence[Use], table: RowTable) -> TurnedRows:
        """Parts of one shape."""
        return _stacked(own, table) if own[1:] else _alone(*own[0])


def narrowed(part: Rotation) -> Rotation:
    """What its blocks change is rounded to bfloat16; the very same part if some is too large for that."""
    changes_FSBB = (whole_blocks(part) - torch.eye(part.blocks_FSBB.shape[-1])).bfloat16()
    return replace(part, blocks_FSBB=changes_FSBB) if changes_FSBB.isfinite().all() else part


def whole_blocks(part: Rotation) -> Tensor:
    """R's own, in float32."""
    blocks_FSBB = part.blocks_FSBB
    if blocks_FSBB.dtype is torch.float32:
        return blocks_FSBB
    return blocks_FSBB.float() + torch.eye(blocks_FSBB.shape[-1], device=blocks_FSBB.device)


def _turned(part: Rotation, v_TD: Tensor) -> Tensor:
    """``R v``, block by block."""
    size = part.blocks_FSBB.shape[-1]
    for blocks_SBB, chunk in zip(whole_blocks(part), part.chunks, strict=True):
        pieces = _gathered(v_TD, chunk, size).reshape(len(v_TD), -1, size).unbind(1)
        blocks = blocks_SBB.expand(len(pieces), size, size)
        turned = [piece @ block.T for piece, block in zip(pieces, blocks, strict=True)]
        v_TD = _scattered(torch.cat(turned, dim=-1), chunk, size)
    return v_TD


def _gathered(v: Tensor, chunk: int, size: int) -> Tensor:
    """Each chunk's halves dealt out piece by piece, so that every block finds its entries side by side."""
    if chunk == size:
        return v
    return v.reshape(*v.shape[:-1], -1, 2, chunk // size, size // 2).transpose(-3, -2).flatten(-4)


def _scattered(v: Tensor, chunk: int, size: int) -> Tensor:
    """What `_gathered` did, undone."""
    if chunk == size:
        return v
    return v.reshape(*v.shape[:-1], -1, chunk // size, 2, size // 2).transpose(-3, -2).flatten(-4)


@dataclass(frozen=True, slots=True, eq=False)
class TurnedRows(ABC):
    """Rows that are turned together: all of one adapter, or one of each of several."""

    rows_N: Tensor
    index: Tensor | slice | None
    """As ``rows_N``, but a slice or None where that saves the gather."""
    weights_N1: Tensor
    extra_scale_GO: Tensor | None
    """``scale − 1`` of each adapter."""

    @abstractmethod
    def turned(self, v_TD: Tensor) -> Tensor:
        """What their adapters make of the rows, [N, D]."""

    @abstractmethod
    def change(self, v_TD: Tensor) -> Tensor:
        """The weighted difference to the rows, [N, D]."""

    def gain(self) -> Tensor:
        """The weighted ``scale − 1`` of each row, [N, O]."""
        assert self.extra_scale_GO is not None
        weights_GM1 = self.weights_N1.view(len(self.extra_scale_GO), -1, 1)
        return (self.extra_scale_GO.unsqueeze(1) * weights_GM1).flatten(0, 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Products(TurnedRows):
    """By batched products of all blocks, one for each factor."""

    blocks_GFSBB: Tensor
    chunks: tuple[int, ...]

    def turned(self, v_TD: Tensor) -> Tensor:
        return self._turned(self._rows(v_TD))

    def change(self, v_TD: Tensor) -> Tensor:
        v_ND = self._rows(v_TD)
        return (self._turned(v_ND) - v_ND) * self.weights_N1

    def _rows(self, v_TD: Tensor) -> Tensor:
        return (v_TD if self.index is None else v_TD[self.index]).float()

    def _turned(self, v_ND: Tensor) -> Tensor:
        v_GMD = v_ND.view(len(self.blocks_GFSBB), -1, v_ND.shape[1])
        for factor, chunk in enumerate(self.chunks):
            blocks_GSBB = self.blocks_GFSBB[:, factor]
            size = blocks_GSBB.shape[-1]
            v_GMD = _scattered(_multiplied(_gathered(v_GMD, chunk, size), blocks_GSBB), chunk, size)
        return v_GMD.reshape_as(v_ND)


def _multiplied(v_GMD: Tensor, blocks_GSBB: Tensor) -> Tensor:
    """Consecutive entries of every row times the blocks of its adapter."""
    groups, rows, _ = v_GMD.shape
    stored, size = blocks_GSBB.shape[1:3]
    v_GMSKB = v_GMD.reshape(groups, rows, stored, -1, size)
    v_XYB = v_GMSKB.transpose(1, 2).reshape(groups * stored, -1, size)
    turned_XYB = torch.bmm(v_XYB, blocks_GSBB.reshape(groups * stored, size, size).transpose(1, 2))
    return turned_XYB.view(groups, stored, rows, -1, size).transpose(1, 2).reshape_as(v_GMD)


def _alone(segment: Segment, part: Rotation) -> TurnedRows:
    return _Products(
        segment.rows_N,
        segment.index,
        segment.weights_N.unsqueeze(1),
        None if part.scale_O is None else part.scale_O.unsqueeze(0) - 1,
        whole_blocks(part).unsqueeze(0),
        part.chunks,
    )


def _stacked(own: Sequence[Use], table: RowTable) -> TurnedRows:
    each = [part for segment, part in own for _ in range(len(segment.rows_N))]
    blocks_GFSBB = torch.stack([whole_blocks(part) for part in each])
    return _Products(*paired_rows(own, table), extra_scales(each), blocks_GFSBB, each[0].chunks)


def paired_rows(own: Sequence[Use], table: RowTable) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows, their index and their weights, one adapter's after another's."""
    rows_N = torch.cat([segment.rows_N for segment, _ in own])
    every_row = torch.arange(table.num_rows, device=rows_N.device)
    index = None if torch.equal(rows_N, every_row) else rows_N
    return rows_N, index, torch.cat([segment.weights_N for segment, _ in own]).unsqueeze(1)


def extra_scales(parts: Sequence[Rotation]) -> Tensor | None:
    scales = [part.scale_O for part in parts if part.scale_O is not None]
    return torch.stack(scales) - 1 if scales else None


@dataclass(frozen=True, slots=True, eq=False)
class _Side:
    """All batches at one side of one member, not none; their rows one after the other."""

    batches: Sequence[TurnedRows]
    rows: Tensor | slice | None

    @staticmethod
    def of(batches: Sequence[TurnedRows]) -> _Side | None:
        if len(batches) < 2:
            return _Side(batches, batches[0].index) if batches else None
        return _Side(batches, torch.cat([batch.rows_N for batch in batches]))

    def change(self, v_TD: Tensor) -> Change:
        return Change(_joined([batch.change(v_TD) for batch in self.batches]), self.rows)

    def own_product(self, x_TI: Tensor) -> OwnProduct:
        turned = [batch.turned(x_TI) for batch in self.batches]
        return OwnProduct(_joined(turned), _joined([b.gain() for b in self.batches]), self.rows)


def _joined(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.cat(list(values))


class _BoundRotation(Bound):
    def __init__(
        self, inputs: Sequence[Sequence[TurnedRows]], outputs: Sequence[Sequence[TurnedRows]]
    ) -> None:
        self._inputs = [_Side.of(batches) for batches in inputs]
        self._outputs = [_Side.of(batches) for batches in outputs]
        self._scaled = [_Side.of([b for b in own if b.extra_scale_GO is not None]) for own in inputs]

    @property
    def reads_input_alone(self) -> bool:
        return False

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        side = self._inputs[member]
        return None if side is None else side.change(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        side = self._outputs[member]
        return None if side is None else side.change(y_TO)

    def own_product(self, member: int, x_TI: Tensor) -> OwnProduct | None:
        side = self._scaled[member]
        return None if side is None else side.own_product(x_TI)
