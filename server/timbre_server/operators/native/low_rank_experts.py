"""Experts of low rank in C++: each is read for those rows alone that a router sends to it.

Legend: T rows of the batch, N rows of one adapter, I in, O out, R ranks, K gates of one adapter.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.contract import Change, Uses
from timbre_server.operators.live_rows import rows_fields
from timbre_server.operators.low_rank import BoundGated, Gating
from timbre_server.operators.native.uses import (
    KernelChange,
    address_of,
    low_rank_fields,
    rows_of,
    structures,
)
from timbre_server.operators.row_table import RowTable, Segment


@dataclass(frozen=True, slots=True, eq=False)
class AdapterExperts:
    """Those of one adapter at one member, without its rows. The ranks of one part have one gate."""

    address: int
    """``Expert`` of ``low_rank.cpp``, one after the other."""
    count: int
    shape: tuple[int, int]
    """[O, I]"""
    num_ranks: int
    """Of all."""
    held: object
    """What lies at the address."""

    @staticmethod
    def of(parts: Sequence[LowRank], columns: Sequence[int]) -> AdapterExperts:
        """Of one part at least; ``columns``: of each part, that of its gate."""
        factors = [(part.a_RI.contiguous(), part.b_OR.T.contiguous()) for part in parts]
        fields = [(*low_rank_fields(*own), column) for own, column in zip(factors, columns, strict=True)]
        experts = structures(fields)
        shape = factors[0][1].shape[1], factors[0][0].shape[1]
        num_ranks = sum(len(a_RI) for a_RI, _ in factors)
        return AdapterExperts(address_of(experts), len(parts), shape, num_ranks, (factors, experts))


class ExpertsKernel:
    """The experts of all adapters at one member, for the rows of one table."""

    def __init__(self, adapters: Sequence[tuple[AdapterExperts, Segment, int, float]]) -> None:
        """Of one at least: with its rows, the number of its gates among all adapters', and the share of its
        experts that act on a row."""
        self._held = [(own, segment) for own, segment, _, _ in adapters]
        self.out_features, self._in_features = adapters[0][0].shape
        self._uses = structures(  # ``AdapterExperts`` of ``low_rank.cpp``.
            [(own.address, own.count, *rows_fields(rows), number) for own, rows, number, _ in adapters]
        )
        ranks = sum(len(rows.rows_N) * own.num_ranks * share for own, rows, _, share in adapters)
        self._work = int(ranks) * (self._in_features + self.out_features)
        self._begin = (address_of(self._uses), len(adapters))
        self._run = kernel(
            "timbre_low_rank_experts", ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER, ADDRESS, NUMBER
        )

    @cached_property
    def rows_N(self) -> Tensor:  # noqa: N802
        return rows_of(segment for _, segment in self._held)

    def add(self, gates: array[int], x_TI: Tensor, y_TO: Tensor) -> None:
        """``gates``: ``Gates`` of ``low_rank.cpp``, of all adapters; x is float32."""
        threads = num_threads(self._work)
        addresses = address_of(gates), x_TI.data_ptr()
        self._run(*self._begin, *addresses, self._in_features, y_TO.data_ptr(), self.out_features, threads)


def gate_views(each_NK: Sequence[Tensor]) -> array[int]:
    """``Gates`` of ``low_rank.cpp``; who keeps them keeps these."""
    return structures([(gates_NK.data_ptr(), gates_NK.shape[1]) for gates_NK in each_NK])


class BoundExperts(BoundGated):
    """All experts of low rank at a group, with gates from wherever they come."""

    def __init__(self, uses: Uses[LowRank], table: RowTable, gating: Gating) -> None:
        self._segments = [s for s in table.segments if any(s.slot in parts_by_slot for parts_by_slot in uses)]
        members: list[list[tuple[AdapterExperts, Segment, int, float]]] = [[] for _ in uses]
        for number, segment in enumerate(self._segments):
            rank, columns = 0, gating.columns[segment.slot]
            share = gating.num_kept[segment.slot] / gating.num_columns[segment.slot]
            for own, parts_by_slot in zip(members, uses, strict=True):
                parts = [part for part in parts_by_slot.get(segment.slot, ()) if part.a_RI.shape[0]]
                firsts = list(accumulate((part.a_RI.shape[0] for part in parts), initial=rank))
                rank = firsts.pop()
                if parts:
                    experts = AdapterExperts.of(parts, [columns[first] for first in firsts])
                    own.append((experts, segment, number, share))
        self._members = [ExpertsKernel(own) if own else None for own in members]

    def sums(self, x_TI: Tensor, gates: Callable[[int], Tensor]) -> Sequence[Sequence[Change]]:
        x_TI = x_TI.contiguous()
        each_NK = [gates(segment.slot).contiguous() for segment in self._segments]
        views = gate_views(each_NK)
        return [
            () if member is None else (KernelChange(GatedExperts(member, views, each_NK), x_TI, len(x_TI)),)
            for member in self._members
        ]


@dataclass(frozen=True, slots=True, eq=False)
class GatedExperts:
    """The `Kernel` of one member, whose source is x in float32."""

    experts: ExpertsKernel
    gates: array[int]
    """`gate_views`."""
    held: Sequence[Tensor]
    """The gates."""

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self.experts.rows_N

    @property
    def out_features(self) -> int:
        return self.experts.out_features

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        self.experts.add(self.gates, source, y_TO)
