"""Linear layers of the base that apply, to each row, the adapters that the row table names.

An `AdaptedLinear` takes a layer's place by composition: the base product stays the layer's own. Layers
that read the very same tensor share an `AdaptedGroup`.

    y = W x' + b + changes from W x' + changes from y0 = W x + b + changes from x + own products

with x' = x + input changes.

Base rows get exactly the base product's bits: a row that no adapter touches is never added to. Where every
row of a step is that of one mix whose weights are merged, a layer runs on those, and nothing is added.

Legend: T rows of the batch, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from timbre_server.adapters.active_rows import RowCopies
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.added import added, rows_of
from timbre_server.adapters.in_place import InPlace
from timbre_server.native.joining import Joining
from timbre_server.native.recording import Recording, recording, repeated
from timbre_server.native.rounding import round_into, rounded, widen_into
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, Tape
from timbre_server.operators.contract import Bound, Change, OwnProduct

Product = Callable[[Tensor], Tensor]
"""``x -> W x + b``."""


@runtime_checkable
class WideProduct(Protocol):
    """A `Product` that need not round its sums to the type of x."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def in_float32(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class JoinedProduct(Protocol):
    """A `Product` that adapters may join before it is rounded, so that nothing else lies in float32. Of few
    rows, which tapes have, factors are better read one adapter after the other."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def joined(self, x: Tensor, joining: Joining) -> Tensor | None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """A product on a tape, and where it reads and writes."""

    product: Tape
    x: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Where a layer's tensors lie on a tape, and what computes them."""

    base: Tape
    x: Tensor
    y: Tensor
    plain: _Sums
    """In float32, where the layer can."""
    changed: _Sums
    """The same of another input."""
    wides: tuple[Tensor, Tensor]
    """Float32 to make that of: for x, and for what it becomes."""


class AdaptedLinear(nn.Module):
    """One linear layer of the base in an `AdaptedGroup`."""

    def __init__(
        self, base: nn.Module, product: Product | WideProduct, group: AdaptedGroup, member: int
    ) -> None:
        """``product`` computes ``W x + b`` for the layer ``base``, by whatever means is fastest."""
        super().__init__()
        self.base = base
        self.merged: Product | None = None
        """The product with merged weights, where there are any."""
        self._product = product
        # Where sums need not be rounded they are not, whoever adds to them: a row's bits are its own.
        self._sums = product.in_float32 if isinstance(product, WideProduct) else product
        self._joined = product.joined if isinstance(product, JoinedProduct) else None
        self._group = group
        self._member = member

    @property
    def weight(self) -> Tensor:
        """The base layer's own, as stored: models look at its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        recorded = recording()
        return self._output(x) if recorded is None else self._on_tape(recorded, x.contiguous())

    def _on_tape(self, recorded: Recording, x: Tensor) -> Tensor:
        """The base product as it is, or what the rows of each step that is played need beside it."""
        base, y = recorded.branch(self._product, x, is_dry=True)
        is_rounded = y.dtype is not torch.float32
        plain, sums = recorded.branch(self._sums, x, is_dry=True) if is_rounded else (base, y)
        changed_x = torch.empty_like(x)
        changed, changed_sums = recorded.branch(self._sums, changed_x, is_dry=True)
        wides = [torch.empty_like(x, dtype=torch.float32) for _ in range(2)] if is_rounded else [x, changed_x]
        kept = recorded.kept
        places = _Places(
            base,
            kept(x),
            kept(y),
            _Sums(plain, kept(x), kept(sums)),
            _Sums(changed, kept(changed_x), kept(changed_sums)),
            (kept(wides[0]), kept(wides[1])),
        )
        repeated(Choice(self._group.state, partial(self._chosen, places)))
        return y

    def _chosen(self, places: _Places) -> Tape:
        """What gives y, for as long as the group's state is the same."""
        group, sums = self._group, places.plain.sums
        bounds = group.bound()
        if not bounds and not group.rows_are_merged:
            return places.base
        is_added_to = sums.dtype is torch.float32 and sums.is_contiguous()
        own = group.in_place(self._member) if bounds and is_added_to else None
        if own is None:
            return Tape([lambda: places.y.copy_(self._output(places.x))])
        if own.changes_nothing:
            return places.base
        write = partial(self._write, places)
        is_known = group.outlasts_tables and places.y.dtype in (torch.float32, torch.bfloat16)
        return Recording.of_kernels(write) if is_known else Tape([write])

    def _write(self, places: _Places) -> object:
        """Returns what the kernels read."""
        own = self._group.in_place(self._member)
        assert own is not None, "a tape that was chosen in another state"
        used, other = places.plain, places.changed
        if own.is_hidden:  # First, as it was recorded: meanwhile it may use what was taken after.
            repeated(places.plain.product)
        if own.inputs:
            used, other = other, used
            self._change_input(own, places)
        repeated(used.product)
        y0 = used.sums
        if own.is_hidden:
            y0 = other.sums
        elif len(own.outputs) > 1:
            y0 = widen_into(other.sums, used.sums)
        held = self._add_in_place(own, places.x, y0, used.sums)
        if used.sums is not places.y:
            round_into(places.y, used.sums)
        return places, own, held

    def _change_input(self, own: InPlace, places: _Places) -> None:
        source, wide = places.wides
        widen_into(wide, places.x)
        if (are_several := len(own.inputs) > 1) and source is not places.x:
            widen_into(source, places.x)
        for each in own.inputs:
            each.add(source if are_several else wide, wide)
        if wide is not places.changed.x:
            round_into(places.changed.x, wide)

    def _output(self, x: Tensor) -> Tensor:
        group, member = self._group, self._member
        if self.merged is not None and group.rows_are_merged:
            return self.merged(x)
        bounds, copies = group.bound(), group.copies
        if copies is None:
            if not bounds:
                return self._product(x)
            if x.is_contiguous() and (own := group.in_place(member)) is not None:
                return self._product(x) if own.changes_nothing else self._changed_in_place(own, x)
        if all(bound.reads_input_alone for bound in bounds):
            if copies is not None and copies.last == group.paths[member]:
                return self._where_copies_meet(copies, x)
            changes = group.changes(member, x) if bounds else ()
            return added(self._base_sums(x), changes, is_own=True).to(x.dtype)
        x_TI = rows_of(x)
        inputs = [c for b in bounds if (c := b.input_change(self._member, x_TI)) is not None]
        y = self._sums(added(x, inputs)) if inputs else self._base_sums(x)
        sums = self._group.changes(self._member, x)  # Routers choose there for what acts on outputs, too.
        products: list[Change] = []
        if inputs:
            product_TO = rows_of(y).float() - (0.0 if self.bias is None else self.bias.float())
            products = [c for b in bounds if (c := b.product_change(self._member, product_TO)) is not None]
        outputs = self._output_changes(bounds, x, y, changed_input=bool(inputs))
        produced = [self._produced(o, x) for b in bounds if (o := b.own_product(self._member, x_TI))]
        changes = [*products, *outputs, *sums, *produced]
        return added(y, changes, is_own=True).to(x.dtype)

    def _changed_in_place(self, own: InPlace, x: Tensor) -> Tensor:
        """As `forward`, for a contiguous x: all is added in float32, and rounded once."""
        if own.joining and self._joined and (joined := self._joined(x, own.joining)) is not None:
            return joined
        changed = x
        if own.inputs:
            changed = x.to(torch.float32, copy=True)
            source = changed if len(own.inputs) == 1 else x.float()
            for each in own.inputs:
                each.add(source, changed)
            changed = changed.to(x.dtype)
        y = self._sums(changed).float().contiguous()
        y0 = y
        if own.is_hidden:
            y0 = self._sums(x).float().contiguous()
        elif len(own.outputs) > 1:
            y0 = y.clone()
        self._add_in_place(own, x, y0, y)
        return rounded(y, x.dtype)

    def _add_in_place(self, own: InPlace, x: Tensor, y0: Tensor, y: Tensor) -> object:
        """Returns what kernels read that lies nowhere else."""
        held: Sequence[Tensor] = ()
        # Before all else: routers choose there for what acts on outputs, too.
        sources = self._group.sources(self._member, x) if own.sums else ()
        for each in own.products:
            if self.bias is not None and not held:
                less_TO = (-self.bias.float()).expand_as(y).contiguous()
                held = less_TO, torch.empty_like(y)
                sum_into(held[1], y, less_TO)
            each.add(held[1] if held else y, y)
        for each in own.outputs:
            each.add(y0, y)
        for number, add in own.sums:
            add(sources[number], y)
        return held

    def _base_sums(self, x: Tensor) -> Tensor:
        copies = self._group.copies
        if copies is not None and x is copies.x_1PD:
            return self._sums(copies.x_1TD).index_select(1, copies.row_P)
        return self._sums(x)

    def _where_copies_meet(self, copies: RowCopies, x: Tensor) -> Tensor:
        """``Σ_p g_p (W x_p + b + changes_p)`` for each row, with one base product: the block's output."""
        y = self._sums(copies.meet(x).to(x.dtype))
        changes = [copies.met(change) for change in self._group.changes(self._member, x)]
        if self.bias is not None:
            changes.append(copies.bias_change(self.bias))
        copies.have_met = True
        return added(y, changes, is_own=True).to(x.dtype)

    def _output_changes(
        self, bounds: Sequence[Bound], x: Tensor, y: Tensor, *, changed_input: bool
    ) -> list[Change]:
        """To be added before all others: one alone may read y where it is added to it."""
        are_several = sum(not bound.reads_input_alone for bound in bounds) > 1
        y0 = y.clone() if are_several and not changed_input else y
        found: list[Change] = []
        for bound in bounds:
            change = bound.output_change(self._member, rows_of(y0))
            if change is not None and changed_input and y0 is y:
                # A gain acts on the base's own output, which an input change of this step has hidden.
                y0 = self._sums(x)
                change = bound.output_change(self._member, rows_of(y0))
            if change is not None:
                found.append(change)
        return found

    def _produced(self, own: OwnProduct, x: Tensor) -> Change:
        """One more base product, for the rows that need one."""
        y_NO = self._sums(own.x_NI.to(x.dtype)).float()
        product_NO = y_NO if self.bias is None else y_NO - self.bias.float()
        return Change(own.gain_NO * product_NO, own.rows_N)
