"""`Projected`: a small core in a shared basis: ``y += Σ_n outer_n ∘ Q_n (S_n (P_n (inner_n ∘ x)))``.

The products with P and Q are the cost, and what adapters share. P runs once for all rows that use it, at all
members of a group together, and Q once for all rows of a member that use it; where outer vectors come after
Q, once for all uses. Only the cores between them differ: they act on *uses*, (row, part) pairs, which lie
part after part. What a part has of its own for every block, such as RandLoRA's inner and outer vectors, is as
large as the basis and is applied part by part, in pieces.

Legend: T rows of the batch, U uses, A parts, C some rows of one part, I in, O out, N blocks, P and Q sizes of
the basis, K places of a sparse core.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Projected
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 4
"""From this many rows on, a dense core gets a product of its own; below, cores are stacked for each row."""

MAX_CELLS = 2**23
"""Numbers in one piece of what needs a row for each block, or place of a core: 32 MiB."""

Rows = Tensor | slice
Core = Callable[[Tensor], Tensor]
"""``z_UNP -> h_UNQ``"""


class ProjectedOperator(Operator[Projected]):
    part = Projected

    def meaning(self, part: Projected, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        x_NTI = x_TI.unsqueeze(0) if part.inner_NI is None else x_TI * part.inner_NI.unsqueeze(1)
        z_NTP = x_NTI @ part.basis.p_NPI.transpose(1, 2)
        if part.form == "diagonal":
            h_NTQ = z_NTP * part.core.unsqueeze(1)
        elif part.form == "dense":
            h_NTQ = z_NTP @ part.core.T
        else:
            assert part.rows_K is not None
            assert part.columns_K is not None
            core_QP = part.core.new_zeros(part.basis.q_NOQ.shape[2], part.basis.p_NPI.shape[1])
            core_QP.index_put_((part.rows_K, part.columns_K), part.core, accumulate=True)
            h_NTQ = z_NTP @ core_QP.T
        y_NTO = h_NTQ @ part.basis.q_NOQ.transpose(1, 2)
        if part.outer_NO is not None:
            y_NTO = y_NTO * part.outer_NO.unsqueeze(1)
        return Meaning(change_TO=y_NTO.sum(0))

    def bind(self, uses: Uses[Projected], table: RowTable) -> Bound:
        shrinks, room = _shrinks(uses, table), PoolRoom()
        return _BoundProjected(shrinks, [_batches(parts, shrinks, table, room) for parts in uses])


def _shrunk(p_NPI: Tensor, x_TI: Tensor) -> Tensor:
    """``z_TNP``: every block's P for all rows, as one product."""
    return linear(x_TI, p_NPI.flatten(0, 1)).view(-1, *p_NPI.shape[:2])


def _shrunk_alone(part: Projected, x_CI: Tensor) -> Tensor:
    """As `_shrunk`, for the rows of one part, whose inner vectors come before P."""
    assert part.inner_NI is not None
    pieces = []
    for x_I in torch.split(x_CI, max(1, MAX_CELLS // part.inner_NI.numel())):
        inner_CNI = x_I.unsqueeze(1) * part.inner_NI
        if len(part.basis.p_NPI) == 1:
            pieces.append(linear(inner_CNI, part.basis.p_NPI[0]))
        else:
            pieces.append(torch.einsum("cni,npi->cnp", inner_CNI, part.basis.p_NPI))
    return torch.cat(pieces)


def _scattered(part: Projected, z_CNP: Tensor) -> Tensor:
    """A sparse core; equal places add."""
    assert part.rows_K is not None
    assert part.columns_K is not None
    products_CK = z_CNP[:, 0, part.columns_K] * part.core
    h_CQ = z_CNP.new_zeros(len(z_CNP), part.basis.q_NOQ.shape[2])
    return h_CQ.scatter_add_(1, part.rows_K.expand_as(products_CK), products_CK).unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Shrink:
    """One P with the rows that use it, and where each row of the batch is among them."""

    p_NPI: Tensor
    rows: Rows
    place_T: Tensor | None

    def __call__(self, x_TI: Tensor) -> Tensor:
        return _shrunk(self.p_NPI, x_TI[self.rows])


Shrinks = Mapping[int, _Shrink]
"""By the identity of their P, which the parts keep alive."""


def _shrinks(uses: Uses[Projected], table: RowTable) -> Shrinks:
    matrices: dict[int, Tensor] = {}
    slots: dict[int, set[int]] = {}
    for parts_by_slot in uses:
        for slot in table.slots:
            for part in parts_by_slot.get(slot, ()):
                if part.inner_NI is None:
                    matrices[id(part.basis.p_NPI)] = part.basis.p_NPI
                    slots.setdefault(id(part.basis.p_NPI), set()).add(slot)
    shrinks = {}
    for key, p_NPI in matrices.items():
        rows_N, place_T = table.rows_using(slots[key]), None
        if rows_N is not None:
            place_T = torch.zeros(table.num_rows, dtype=torch.int64, device=table.device)
            place_T[rows_N] = torch.arange(len(rows_N), device=table.device)
        shrinks[key] = _Shrink(p_NPI, slice(None) if rows_N is None else _picking(rows_N), place_T)
    return shrinks


def _picking(rows_N: Tensor) -> Rows:
    """What picks the rows: a view of consecutive ones, else a gather."""
    if len(rows_N) and bool((rows_N.diff() == 1).all()):
        return slice(int(rows_N[0]), int(rows_N[-1]) + 1)
    return rows_N


@dataclass(frozen=True, slots=True, eq=False)
class _PerUse:
    """A tensor of each part, for each use: broadcast where there is one part, else stacked."""

    values_A: Tensor
    part_U: Tensor | None

    @staticmethod
    def of(values: Sequence[Tensor], counts: list[int]) -> _PerUse:
        if len(values) == 1:
            return _PerUse(values[0].unsqueeze(0), None)
        stacked = torch.stack(list(values))
        if len(values) == sum(counts):
            return _PerUse(stacked, None)
        parts = torch.arange(len(values), device=stacked.device)
        return _PerUse(stacked, parts.repeat_interleave(torch.tensor(counts, device=stacked.device)))

    def values(self) -> Tensor:
        return self.values_A if self.part_U is None else self.values_A[self.part_U]


def _num_stacked(parts: Sequence[Projected], counts: list[int], room: PoolRoom) -> int:
    """How many of the first parts have few rows, and room to copy their cores for each."""
    for place, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if count >= MIN_ROWS_ALONE or not room.take(count * part.core.nbytes):
            return place
    return len(parts)


def _core(parts: Sequence[Projected], counts: list[int], room: PoolRoom) -> Core:
    """The cores of parts of one form; of dense ones those with few rows come first."""
    if parts[0].form == "diagonal":
        diagonals = _PerUse.of([part.core for part in parts], counts)
        return lambda z_UNP: z_UNP * diagonals.values()
    if parts[0].form == "sparse":
        steps = [max(1, MAX_CELLS // max(1, len(part.core))) for part in parts]
        pieces = [
            (part, min(step, count - start))
            for part, count, step in zip(parts, counts, steps, strict=True)
            for start in range(0, count, step)
        ]
        owners, sizes = [part for part, _ in pieces], [size for _, size in pieces]
        return lambda z_UNP: torch.cat(
            [_scattered(part, z) for part, z in zip(owners, z_UNP.split_with_sizes(sizes), strict=True)]
        )
    num_few = _num_stacked(parts, counts, room)
    few = [part.core for part, count in zip(parts[:num_few], counts, strict=False) for _ in range(count)]
    few_UPQ = torch.stack(few).transpose(1, 2) if few else None

    def dense(z_UNP: Tensor) -> Tensor:
        pieces = [] if few_UPQ is None else [torch.bmm(z_UNP[: len(few_UPQ)], few_UPQ)]
        alone = z_UNP[len(few) :].split_with_sizes(counts[num_few:])
        pieces += [linear(z, part.core) for part, z in zip(parts[num_few:], alone, strict=True)]
        return torch.cat(pieces)

    return dense


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Parts of one form at one member that have the same basis, each with all its rows."""

    parts: Sequence[Projected]
    counts: list[int]
    rows: Rows
    """The row of each result."""
    num_rows: int
    places: Rows
    """Where the row of each use is in what the shrink gives."""
    weights_U11: Tensor
    core: Core
    distinct_U: Tensor | None
    """Where rows have several uses, which are summed before Q: the place of each use's row in `rows`."""
    outer: _PerUse | None

    @staticmethod
    def of(own: Sequence[tuple[Segment, Projected]], shrinks: Shrinks, room: PoolRoom) -> _Batch:
        if own[0][1].form == "dense":
            own = sorted(own, key=lambda use: len(use[0].rows_N) >= MIN_ROWS_ALONE)
        parts = [part for _, part in own]
        counts = [len(segment.rows_N) for segment, _ in own]
        rows_U = torch.cat([segment.rows_N for segment, _ in own])
        weights_U = torch.cat([segment.weights_N for segment, _ in own])
        place_T = None if parts[0].inner_NI is not None else shrinks[id(parts[0].basis.p_NPI)].place_T
        rows_are, distinct_U, outer = rows_U, None, None
        if parts[0].outer_NO is None:
            rows_are, distinct_U = torch.unique(rows_U, return_inverse=True)
            if len(rows_are) == len(rows_U):
                rows_are, distinct_U = rows_U, None
        elif len(parts[0].outer_NO) == 1:
            outer = _PerUse.of([part.outer_NO[0] for part in parts if part.outer_NO is not None], counts)
        return _Batch(
            parts,
            counts,
            rows=_picking(rows_are),
            num_rows=len(rows_are),
            places=_picking(rows_U if place_T is None else place_T[rows_U]),
            weights_U11=weights_U.view(-1, 1, 1),
            core=_core(parts, counts, room),
            distinct_U=distinct_U,
            outer=outer,
        )

    def change(self, x_TI: Tensor, shrunk: Mapping[int, Tensor]) -> Change:
        first = self.parts[0]
        if first.inner_NI is None:
            z_UNP = shrunk[id(first.basis.p_NPI)][self.places]
        else:
            alone = x_TI[self.places].split_with_sizes(self.counts)
            z_UNP = torch.cat([_shrunk_alone(p, x_CI) for p, x_CI in zip(self.parts, alone, strict=True)])
        h_UNQ = self.core(z_UNP) * self.weights_U11
        if first.outer_NO is None:
            return Change(self._expanded(h_UNQ), self.rows)
        if self.outer is not None:
            return Change(linear(h_UNQ[:, 0], first.basis.q_NOQ[0]) * self.outer.values(), self.rows)
        alone = h_UNQ.split_with_sizes(self.counts)
        y_UO = torch.cat([_expanded_alone(p, h_CNQ) for p, h_CNQ in zip(self.parts, alone, strict=True)])
        return Change(y_UO, self.rows)

    def _expanded(self, h_UNQ: Tensor) -> Tensor:
        """Q for every distinct row, all blocks in one product."""
        q_NOQ = self.parts[0].basis.q_NOQ
        h = h_UNQ.flatten(1) if len(q_NOQ) > 1 else h_UNQ.sum(1)
        if self.distinct_U is not None:
            h = h.new_zeros(self.num_rows, h.shape[1]).index_add_(0, self.distinct_U, h)
        # A view where Q is laid out as [O, N, Q], which methods with many blocks see to.
        return linear(h, q_NOQ.transpose(0, 1).flatten(1))


def _expanded_alone(part: Projected, h_CNQ: Tensor) -> Tensor:
    """Q for the rows of one part that has an outer vector for each of several blocks."""
    assert part.outer_NO is not None
    pieces = []
    for h_NQ in torch.split(h_CNQ, max(1, MAX_CELLS // part.outer_NO.numel())):
        if len(part.basis.q_NOQ) == 1:
            y_CNO = linear(h_NQ, part.basis.q_NOQ[0])
        else:
            y_CNO = torch.einsum("cnq,noq->cno", h_NQ, part.basis.q_NOQ)
        pieces.append((y_CNO * part.outer_NO).sum(1))
    return torch.cat(pieces)


def _batches(
    parts_by_slot: Mapping[int, Sequence[Projected]], shrinks: Shrinks, table: RowTable, room: PoolRoom
) -> list[_Batch]:
    batches: dict[tuple[object, ...], list[tuple[Segment, Projected]]] = {}
    for segment in table.segments:
        for part in parts_by_slot.get(segment.slot, ()):
            batches.setdefault(_alike(part), []).append((segment, part))
    return [_Batch.of(own, shrinks, room) for own in batches.values()]


def _alike(part: Projected) -> tuple[object, ...]:
    """What parts of one batch have in common."""
    num_blocks = len(part.core) if part.form == "diagonal" else 1
    vectors = part.inner_NI is not None, part.outer_NO is not None
    return id(part.basis.p_NPI), id(part.basis.q_NOQ), part.form, num_blocks, *vectors


class _BoundProjected(Bound):
    def __init__(self, shrinks: Shrinks, members: Sequence[Sequence[_Batch]]) -> None:
        self._shrinks = shrinks
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        shrunk = {key: shrink(x_TI) for key, shrink in self._shrinks.items()}
        return [[batch.change(x_TI, shrunk) for batch in batches] for batches in self._members]
