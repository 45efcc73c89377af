"""`Circulant`: ``y[m] += Σ_n irfft(g[m, n] · rfft(x[n]))``, block by block in the frequency domain.

The input's pieces are transformed once for all adapters of equal block size and every member of the group,
products of all adapters add up as spectra, and each member's sums are transformed back once. An adapter with
several rows, or without room for copies, gets one product for each frequency; the others run as
(row, adapter) pairs in one batched one.

Legend: T rows of the batch, U rows that use one block size b, P pairs, I in, O out, K = b/2 + 1 frequencies,
N = I/b and M = O/b pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.program import Circulant
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4


class CirculantOperator(Operator[Circulant]):
    part = Circulant

    def meaning(self, part: Circulant, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        b = part.block_size
        taps_MNb = torch.fft.irfft(torch.view_as_complex(part.spectrum_MNK2), n=b)
        steps = torch.arange(b, device=x_TI.device)
        blocks_MNbb = taps_MNb[..., (steps.unsqueeze(1) - steps) % b]
        delta_OI = blocks_MNbb.transpose(1, 2).reshape(y_TO.shape[1], x_TI.shape[1])
        return Meaning(change_TO=x_TI @ delta_OI.T)

    def bind(self, uses: Uses[Circulant], table: RowTable) -> Bound:
        slots_by_size: dict[int, set[int]] = {}
        for parts_by_slot in uses:
            for slot in table.slots:
                for part in parts_by_slot.get(slot, ()):
                    slots_by_size.setdefault(part.block_size, set()).add(slot)
        room = PoolRoom()
        return _BoundCirculant(
            len(uses), [_bind_size(b, uses, table, slots, room) for b, slots in slots_by_size.items()]
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter by itself."""

    segment: Segment
    g_KNM: Tensor

    def add(self, z_TKN: Tensor, h_TKM: Tensor) -> None:
        index = self.segment.index
        h_KTM = torch.bmm(z_TKN[index].transpose(0, 1), self.g_KNM)
        h_TKM[index] += h_KTM.transpose(0, 1) * self.segment.weights_N.view(-1, 1, 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Adapters with few rows: their spectra stacked, once for each row that uses them, with its weight."""

    rows_P: Tensor
    g_PKMN: Tensor

    def add(self, z_TKN: Tensor, h_TKM: Tensor) -> None:
        z_PKN1 = z_TKN[self.rows_P].unsqueeze(3)
        h_TKM.index_add_(0, self.rows_P, (self.g_PKMN @ z_PKN1).squeeze(3))


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    num_pieces: int
    products: Sequence[_Alone | _Pairs]


@dataclass(frozen=True, slots=True, eq=False)
class _BlockSize:
    """All adapters of one block size at a group."""

    block_size: int
    rows_U: Tensor | None
    members: Sequence[_Member | None]

    def change(self, member: _Member, z_UKN: Tensor) -> Change:
        h_UKM = z_UKN.new_zeros(*z_UKN.shape[:2], member.num_pieces)
        for product in member.products:
            product.add(z_UKN, h_UKM)
        y_UMb = torch.fft.irfft(h_UKM.transpose(1, 2), n=self.block_size)
        return Change(y_UMb.flatten(1), self.rows_U)

    def changes(self, x_TI: Tensor) -> list[Change | None]:
        x_UI = x_TI if self.rows_U is None else x_TI[self.rows_U]
        x_UNb = x_UI.reshape(len(x_UI), -1, self.block_size)
        z_UKN = torch.fft.rfft(x_UNb).transpose(1, 2).contiguous()
        return [None if member is None else self.change(member, z_UKN) for member in self.members]


def _bind_size(b: int, uses: Uses[Circulant], table: RowTable, slots: set[int], room: PoolRoom) -> _BlockSize:
    rows_U, segments = table.compact(slots)
    return _BlockSize(b, rows_U, [_bind_member(b, parts_by_slot, segments, room) for parts_by_slot in uses])


def _bind_member(
    b: int, parts_by_slot: Mapping[int, Sequence[Circulant]], segments: Sequence[Segment], room: PoolRoom
) -> _Member | None:
    products: list[_Alone | _Pairs] = []
    pairs: list[tuple[Segment, Tensor]] = []
    num_pieces = 0
    for segment in segments:
        for part in parts_by_slot.get(segment.slot, ()):
            if part.block_size != b:
                continue
            g_KMN = torch.view_as_complex(part.spectrum_MNK2).permute(2, 0, 1)
            num_pieces = g_KMN.shape[1]
            count = len(segment.rows_N)
            if count < MIN_ROWS_ALONE and room.take(count * g_KMN.nbytes):
                pairs.append((segment, g_KMN))
            else:
                products.append(_Alone(segment, g_KMN.transpose(1, 2)))
    if pairs:
        rows_P = torch.cat([segment.rows_N for segment, _ in pairs])
        weights_P = torch.cat([segment.weights_N for segment, _ in pairs])
        g_PKMN = torch.stack([g_KMN for segment, g_KMN in pairs for _ in range(len(segment.rows_N))])
        products.append(_Pairs(rows_P, g_PKMN.mul_(weights_P.view(-1, 1, 1, 1))))
    return _Member(num_pieces, products) if products else None


class _BoundCirculant(Bound):
    def __init__(self, num_members: int, sizes: Sequence[_BlockSize]) -> None:
        self._num_members = num_members
        self._sizes = sizes

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        found: list[list[Change]] = [[] for _ in range(self._num_members)]
        for size in self._sizes:
            for own, change in zip(found, size.changes(x_TI), strict=True):
                if change is not None:
                    own.append(change)
        return found
