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

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from timbre_server.adapters.active_rows import RowCopies
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.added import added, rows_of
from timbre_server.adapters.in_place import InPlace
from timbre_server.adapters.layer_product import LayerProduct, Product
from timbre_server.adapters.linear_on_tape import LinearOnTape
from timbre_server.native.recording import recording
from timbre_server.native.rounding import rounded
from timbre_server.operators.contract import Bound, Change, OwnProduct


class AdaptedLinear(nn.Module):
    """One linear layer of the base in an `AdaptedGroup`."""

    def __init__(self, base: nn.Module, product: Product, group: AdaptedGroup, member: int) -> None:
        """``product`` computes ``W x + b`` for the layer ``base``, by whatever means is fastest."""
        super().__init__()
        self.base = base
        self.merged: Product | None = None
        """The product with merged weights, where there are any."""
        self._product = LayerProduct(product)
        self._sums = self._product.sums
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
        if recorded is None:
            return self._output(x)
        own = LinearOnTape(self._group, self._member, self._product, self.bias, self._output)
        return own.written(recorded, x.contiguous())

    def _output(self, x: Tensor) -> Tensor:
        group, member = self._group, self._member
        if self.merged is not None and group.rows_are_merged:
            return self.merged(x)
        bounds, copies = group.bound(), group.copies
        if copies is None:
            if not bounds:
                return self._product.rounded(x)
            if x.is_contiguous() and (own := group.in_place(member)) is not None:
                return self._product.rounded(x) if own.changes_nothing else self._changed_in_place(own, x)
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
        if (joined := self._product.joined(x, own.joining)) is not None:
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
        # Before all else: routers choose there for what acts on outputs, too.
        own.add_to(y, y0, self._group.sources(self._member, x) if own.sums else (), self.bias)
        return rounded(y, x.dtype)

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
