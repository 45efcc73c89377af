"""Which rows of a step's batch use which adapters: the only thing that operators see of a request.

Rows are the tokens of a flattened batch. Each *span* of consecutive rows (one request's tokens in this
step) has up to K pairs (adapter slot, weight). One adapter is one pair of weight 1, a mix is several, a
base row has none. A router may give each row its own weights; operators cannot tell.

Legend: T rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

Pairs = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Span:
    """``num_rows`` consecutive rows that use the same adapters with the same weights.

    Its slots are distinct: who builds a span adds the weights of equal adapters first. So a segment has no
    row twice, and may be written to by its rows. With ``virtual_from`` they stand for the virtual tokens of
    their one adapter, from that one on. Rows of a chunk, as prompts are read in, may be multiplied otherwise
    than those that decode: this says which, for a row's bits must not follow from how many are beside it.
    """

    num_rows: int
    pairs: Pairs = ()
    virtual_from: int | None = None
    in_chunk: bool = False

    def __post_init__(self) -> None:
        assert len(self.pairs) < 2 or len(dict(self.pairs)) == len(self.pairs), (
            f"a slot occurs twice among the pairs of a span: {self.pairs}"
        )


@dataclass(frozen=True, eq=False)
class Segment:
    """All rows of a batch that use one adapter, each once: ``rows_N`` int64, increasing, and ``weights_N``
    float32."""

    slot: int
    rows_N: Tensor
    weights_N: Tensor
    first: int | None = None
    """Where the rows are consecutive, the first of them."""

    @cached_property
    def num_rows(self) -> int:
        return len(self.rows_N)

    @property
    def index(self) -> slice | Tensor:
        """What picks the rows: a view of consecutive ones, else a gather."""
        return self.rows_N if self.first is None else slice(self.first, self.first + self.num_rows)

    def moved(self, position_T: Tensor) -> Segment:
        """The same where row t is row ``position_T[t]`` of fewer; what was consecutive stays so."""
        first = None if self.first is None else int(position_T[self.first])
        return Segment(self.slot, position_T[self.rows_N], self.weights_N, first)


class RowTable:
    """The pairs of every row of one step. Immutable but for gates; what follows from it is derived once."""

    def __init__(
        self, spans: Sequence[Span], device: torch.device | str = "cpu", *, is_gated: bool = False
    ) -> None:
        """``is_gated``: a router writes the segments' weights anew before each run of what is bound to the
        table, so that an operator may read them only then. The spans' weights are 1."""
        self.spans = tuple(spans)
        self.is_gated = is_gated
        self.device = torch.device(device)
        self.num_rows = sum(span.num_rows for span in self.spans)
        self._rows_by_mix: dict[frozenset[int], dict[Pairs, Tensor]] = {}

    @property
    def signature(self) -> tuple[Span, ...]:
        """Equal signatures mean equal tables: what was prepared for one serves the other."""
        return self.spans

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The distinct adapter slots in use, in order of first appearance."""
        return tuple(dict.fromkeys(slot for span in self.spans for slot, _ in span.pairs))

    @property
    def only_pairs(self) -> Pairs:
        """What every row uses, where that is the same; else, as for base rows, nothing."""
        first = self.spans[0].pairs if self.spans else ()
        return first if all(span.pairs == first for span in self.spans) else ()

    def times(self, count: int) -> RowTable:
        """The table of a layer that sees each row as ``count`` consecutive ones."""
        if count == 1:
            return self
        spans = [replace(span, num_rows=span.num_rows * count, virtual_from=None) for span in self.spans]
        return RowTable(spans, self.device)

    def rows_using(self, slots: Collection[int]) -> Tensor | None:
        """The rows, int64 increasing, that use any of these slots; None if all rows do."""
        rows: list[int] = []
        start = 0
        for span in self.spans:
            if any(slot in slots for slot, _ in span.pairs):
                rows.extend(range(start, start + span.num_rows))
            start += span.num_rows
        return None if len(rows) == self.num_rows else torch.tensor(rows, device=self.device)

    def compact(self, slots: Collection[int]) -> tuple[Tensor | None, list[Segment]]:
        """`rows_using`, and the segments of these slots in rows counted among those."""
        rows_U = self.rows_using(slots)
        segments = [segment for segment in self.segments if segment.slot in slots]
        if rows_U is None:
            return None, segments
        position_T = torch.zeros(self.num_rows, dtype=torch.int64, device=self.device)
        position_T[rows_U] = torch.arange(len(rows_U), device=self.device)
        return rows_U, [segment.moved(position_T) for segment in segments]

    def by_mix(self, slots: Collection[int]) -> Mapping[Pairs, Tensor]:
        """The rows, int64 increasing, of each distinct mix of these slots; those of none under ``()``."""
        known = frozenset(slots)
        if known not in self._rows_by_mix:
            self._rows_by_mix[known] = self._rows_of_mixes(known)
        return self._rows_by_mix[known]

    def _rows_of_mixes(self, slots: frozenset[int]) -> dict[Pairs, Tensor]:
        rows: dict[Pairs, list[int]] = {}
        start = 0
        for span in self.spans:
            own = tuple(sorted(pair for pair in span.pairs if pair[0] in slots))
            rows.setdefault(own, []).extend(range(start, start + span.num_rows))
            start += span.num_rows
        return {own: torch.tensor(found, device=self.device) for own, found in rows.items()}

    @cached_property
    def in_chunks_T(self) -> Tensor | None:  # noqa: N802
        """Of each row, bool, whether it is one of a chunk; None: none is."""
        if not any(span.in_chunk for span in self.spans):
            return None
        return torch.cat([torch.full((span.num_rows,), span.in_chunk) for span in self.spans])

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The same pairs sorted by adapter: one segment for each distinct slot."""
        rows: dict[int, list[int]] = {}
        weights: dict[int, list[float]] = {}
        start = 0
        for span in self.spans:
            for slot, weight in span.pairs:
                rows.setdefault(slot, []).extend(range(start, start + span.num_rows))
                weights.setdefault(slot, []).extend([weight] * span.num_rows)
            start += span.num_rows
        return tuple(self._segment(slot, rows[slot], weights[slot]) for slot in rows)

    def _segment(self, slot: int, rows: list[int], weights: list[float]) -> Segment:
        return Segment(
            slot,
            torch.tensor(rows, device=self.device),
            torch.tensor(weights, dtype=torch.float32, device=self.device),
            rows[0] if rows[-1] - rows[0] == len(rows) - 1 else None,
        )
