"""A linear layer with adapters, written down once and played for whatever rows and adapters a step has.

Legend: T rows of the batch, I in features, O out features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.in_place import InPlace
from timbre_server.adapters.layer_product import LayerProduct, Product
from timbre_server.native.recording import Recording, repeated
from timbre_server.native.rounding import round_into, widen_into
from timbre_server.native.rows import Rows
from timbre_server.native.tape import Choice, Tape

_JOINED_FROM = 128
"""On a tape of fewer rows, factors are better read one adapter after the other than joined."""


@dataclass(frozen=True, slots=True, eq=False)
class _Taped:
    """A product on a tape, and where it reads and writes."""

    product: Tape
    x: Rows
    y: Rows


class LinearOnTape:
    """Where a layer's tensors lie on a tape, and what computes them."""

    def __init__(
        self, group: AdaptedGroup, member: int, product: LayerProduct, bias_O: Tensor | None, output: Product
    ) -> None:
        """``output``: what the layer gives where it is not written down."""
        self._group, self._member = group, member
        self._product, self._bias_O, self._output = product, bias_O, output

    def written(self, recorded: Recording, x: Tensor) -> Tensor:
        """y of a contiguous x: the base product, or what the rows of each step need beside it."""
        kept = recorded.kept

        def taped(product: Product, x: Tensor) -> tuple[_Taped, Tensor]:
            tape, y = recorded.branch(product, x)
            return _Taped(tape, kept(x), kept(y)), y

        self._base, y = taped(self._product.rounded, x)
        is_rounded = y.dtype is not torch.float32
        # In float32, where the layer can; and the same of another input. All keep their places until the end.
        self._plain, _sums = taped(self._product.sums, x) if is_rounded else (self._base, y)
        changed_x = torch.empty_like(x)
        self._changed, _changed_sums = taped(self._product.sums, changed_x)
        # Float32 to make that of: for x, and for what it becomes.
        wides = [torch.empty_like(x, dtype=torch.float32) for _ in range(2)] if is_rounded else [x, changed_x]
        self._wides = kept(wides[0]), kept(wides[1])
        self._num_rows = recorded.num_rows
        recorded.note(Choice(self._group.state, self._chosen))
        return y

    def _chosen(self) -> Tape:
        """What gives y, for as long as the group's state is the same."""
        group, base, sums = self._group, self._base, self._plain.y.whole
        bounds = group.bound()
        if not bounds and not group.rows_are_merged:
            return base.product
        is_added_to = sums.dtype is torch.float32 and sums.is_contiguous()
        own = group.in_place(self._member) if bounds and is_added_to else None
        if own is None:
            return Tape([lambda num_rows: base.y(num_rows).copy_(self._output(base.x(num_rows)))])
        if own.changes_nothing:
            return base.product
        if not group.outlasts_tables or base.y.whole.dtype not in (torch.float32, torch.bfloat16):
            return Tape([self._write])
        if self not in group.tapes:
            group.tapes[self] = Recording.of_kernels(partial(self._write, self._num_rows), self._num_rows)
        return group.tapes[self]

    def _write(self, num_rows: int) -> object:
        """Returns what the kernels read."""
        own = self._group.in_place(self._member)
        assert own is not None, "a tape that was chosen in another state"
        x, y = self._base.x(num_rows), self._base.y(num_rows)
        joining = own.joining if self._num_rows >= _JOINED_FROM else None
        if self._product.joined(x, joining, y) is not None:
            return own
        used, other = self._plain, self._changed
        if own.is_hidden:  # First, as it was recorded: meanwhile it may use what was taken after.
            repeated(self._plain.product, num_rows)
        if own.inputs:
            used, other = other, used
            self._change_input(own, x, num_rows)
        repeated(used.product, num_rows)
        sums, y0 = used.y(num_rows), used.y(num_rows)
        if own.is_hidden:
            y0 = other.y(num_rows)
        elif len(own.outputs) > 1:
            y0 = widen_into(other.y(num_rows), sums)
        held = own.add_to(sums, y0, self._group.sources(self._member, x) if own.sums else (), self._bias_O)
        if sums is not y:
            round_into(y, sums)
        return own, held

    def _change_input(self, own: InPlace, x: Tensor, num_rows: int) -> None:
        changed = self._changed.x(num_rows)
        source, wide = (wide(num_rows) for wide in self._wides)
        widen_into(wide, x)
        if (are_several := len(own.inputs) > 1) and source is not x:
            widen_into(source, x)
        for each in own.inputs:
            each.add(source if are_several else wide, wide)
        if wide is not changed:
            round_into(changed, wide)
