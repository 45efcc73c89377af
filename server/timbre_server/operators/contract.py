"""The operator interface: a meaning for one adapter, and a way to run many at once.

``meaning`` is the definition, in plain PyTorch, for rows that all use one part. ``bind`` prepares the
parts of all adapters that a row table names, at one group of layers that read the same input, and gives
a `Bound` that may be run any number of times while the table stays the same: decode steps repeat a table,
so what a bind costs is shared by many steps. Yet rows come and go: what follows from an adapter alone is
`prepared` once for all tables, and what is `Standing` outlasts them. Law, tested for every operator::

    for each row t and each of its pairs (slot, w):   bound change[t] = Σ w · meaning(part[slot], x[t])

Everything here is float32, whatever the base's dtype: the sum is rounded once, where it meets the base.

Legend: T rows of the batch, N some of them, I in features, O out features, G members of a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from timbre_methods.program import Part
from timbre_server.native.joining import Joining
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.row_table import RowTable

PartT = TypeVar("PartT", bound=Part)
PreparedT = TypeVar("PreparedT")

Members = Sequence[Sequence[PartT]]
"""One adapter's parts of one kind, at each member of a group."""

Uses = Sequence[Mapping[int, Sequence[PartT]]]
"""For each member of the group, in order: adapter slot -> that adapter's parts there, of one kind."""


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """What to add to some rows: ``values_NO`` float32 to the rows ``rows_N`` (None: to all, in order).

    A tensor of rows may repeat one (a mix); repeated rows add.
    """

    values_NO: Tensor
    rows_N: Tensor | slice | None = None

    def add_to(self, sum_TO: Tensor) -> None:
        """Add it, in place, to a float32 sum of contiguous rows."""
        if isinstance(self.rows_N, Tensor):
            sum_TO.index_add_(0, self.rows_N, self.values_NO)
        else:
            sum_TO[self.rows_N or slice(None)].add_(self.values_NO)


@dataclass(frozen=True, slots=True, eq=False)
class OwnProduct:
    """A base product that some rows need beside the one of all: ``gain_NO ∘ (W x_NI)``, W without the bias.

    It is added to the rows ``rows_N``, which are read as in `Change`. Both tensors are float32.
    """

    x_NI: Tensor
    gain_NO: Tensor
    rows_N: Tensor | slice | None = None


Add = Callable[[Any, Tensor], None]
"""``(source, y_TO)``: add, in place, to y what is made of a source. A source that is a tensor is contiguous,
as y is, which is float32; they may have dimensions before the last that together count rows."""


@dataclass(frozen=True, slots=True)
class SideAdd:
    """What adds an operator's change of one side: ``add(v, v)`` or, to a copy, ``add(v, copy)``."""

    add: Add
    slots: Collection[int] = field(compare=False)
    """Of the adapters that change it, whatever table runs: as they come and go."""


@dataclass(frozen=True, slots=True, eq=False)
class Adds:
    """All that a bound operator does to one member, each as what adds it where it belongs."""

    input_change: SideAdd | None = None
    """From x."""
    output_change: SideAdd | None = None
    """From y0."""
    sums: Add | None = None
    """From what `Bound.source` makes of x."""
    joining: Joining | None = None
    """The same from x itself, with the base product, to the bit."""
    product_change: SideAdd | None = None
    """From the base product of the changed input."""


class Bound:
    """One operator, ready for one row table at one group. An operator overrides what it acts on."""

    @property
    def reads_input_alone(self) -> bool:
        """Whether `sums` is all that it does."""
        return True

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        """What to add to the input of one member's base product."""
        return None

    @property
    def takes_any_type(self) -> bool:
        """Whether `sums` takes x in the model's own type; else it is float32."""
        return False

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        """What to add to the output of every member, from the input alone; computed together so that
        members share transforms and shrinks. Empty, or one sequence for each member. All are to be added
        before this runs again."""
        return ()

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        """What to add to one member's output, from the base's own output y0."""
        return None

    def product_change(self, member: int, y_TO: Tensor) -> Change | None:
        """What to add to one member's output, before all else, from the base product of the input as all
        operators have changed it, without the bias."""
        return None

    def own_product(self, member: int, x_TI: Tensor) -> OwnProduct | None:
        """What to add to one member's output that takes W and an input of the row's own."""
        return None

    def adds(self, member: int) -> Adds | None:
        """The same as all methods above, for whoever has float32 to add to; None: only they do it."""
        return None

    def source(self, x_TI: Tensor) -> Any:
        """What its adding of `sums` reads, made of a contiguous x for all members, until another is made."""
        return x_TI.float()

    @property
    def outlasts_tables(self) -> bool:
        """Whether `adds` and `source` call kernels alone, for x in float32 or bfloat16, and kernels that were
        called so may be called again for any table that this was bound to since, of as many rows."""
        return False


@dataclass(frozen=True, slots=True, eq=False)
class Meaning:
    """What one part does to rows that all use it with weight 1."""

    input_change_TI: Tensor | None = None
    change_TO: Tensor | None = None
    own_product: OwnProduct | None = None


class Operator(ABC, Generic[PartT]):
    """One kind of algebra."""

    part: ClassVar[type[Part]]

    @abstractmethod
    def meaning(self, part: PartT, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        """The definition. ``y_TO`` is the base's output at x, with its bias."""

    @abstractmethod
    def bind(self, uses: Uses[PartT], table: RowTable) -> Bound:
        """Prepare the parts for a table. Parts are never modified and stay owned by their adapters."""

    def prepared(self, members: Members[PartT]) -> Any:
        """What `bind_prepared` takes of an adapter with such parts at a group. Runs beside steps, too."""
        return members

    def bind_prepared(self, adapters: Mapping[int, Any], table: RowTable) -> Bound:
        """`bind`, of adapters by slot, in the order of the table's."""
        return self.bind(uses_of(adapters), table)


class Standing(ABC, Generic[PreparedT]):
    """Adapters that come and go at one group, and what binds them to one table after another."""

    @abstractmethod
    def admit(self, slot: int, prepared: PreparedT) -> None: ...

    @abstractmethod
    def dismiss(self, slot: int) -> None:
        """One that was admitted."""

    @abstractmethod
    def bound(self, table: RowTable) -> Bound:
        """To a table of adapters among these. What it gave for another must not be run any more."""


class StandingOperator(Operator[PartT], Generic[PartT, PreparedT]):
    """One that need not begin anew when rows come and go."""

    @abstractmethod
    def prepared(self, members: Members[PartT]) -> PreparedT: ...

    @abstractmethod
    def standing(self, rows: LiveRows) -> Standing[PreparedT]:
        """Of no adapter yet. ``rows``: those of all groups that run the same tables."""

    def bind(self, uses: Uses[PartT], table: RowTable) -> Bound:
        each = {slot: [own.get(slot, ()) for own in uses] for slot in table.slots}
        return self.bind_prepared({s: self.prepared(own) for s, own in each.items() if any(own)}, table)

    def bind_prepared(self, adapters: Mapping[int, PreparedT], table: RowTable) -> Bound:
        standing = self.standing(LiveRows())
        for slot, prepared in adapters.items():
            standing.admit(slot, prepared)
        return standing.bound(table)


def uses_of(adapters: Mapping[int, Members[PartT]]) -> Uses[PartT]:
    """The same by member; of one adapter at least."""
    num_members = len(next(iter(adapters.values())))
    return [
        {slot: members[member] for slot, members in adapters.items() if members[member]}
        for member in range(num_members)
    ]
