"""What operators add to a layer by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timbre_server.native.joining import Joining
from timbre_server.native.sums import sum_into
from timbre_server.operators.contract import Add, Bound, SideAdd
from timbre_server.operators.row_table import RowTable


@dataclass(frozen=True, slots=True)
class InPlace:
    """All that operators do to one layer, where each adds it by itself: the changes lie nowhere else."""

    inputs: tuple[SideAdd, ...]
    outputs: tuple[SideAdd, ...]
    """To the base's own output."""
    is_hidden: bool
    """Whether a row needs that, whose input is changed; else all who do have the same with changed inputs."""
    products: tuple[SideAdd, ...]
    """To the base product of the changed input; only where that is changed."""
    sums: tuple[tuple[int, Add], ...]
    """With the number of the operator."""
    joining: Joining | None
    """What does it all, with the base product."""

    @property
    def changes_nothing(self) -> bool:
        return not (self.inputs or self.outputs or self.sums)

    @property
    def follows_from_table(self) -> bool:
        """Whether it may be something else for other rows of the same adapters."""
        return bool(self.inputs and self.outputs)

    def add_to(self, y: Tensor, y0: Tensor, sources: Sequence[Any], bias_O: Tensor | None) -> object:
        """All that it adds to the float32 sums y; y0 are the base's own, and ``sources`` what the operators
        have made of x. Returns what kernels read that lies nowhere else."""
        held: Sequence[Tensor] = ()
        for each in self.products:
            if bias_O is not None and not held:
                less_TO = (-bias_O.float()).expand_as(y).contiguous()
                held = less_TO, torch.empty_like(y)
                is_made = sum_into(held[1], y, less_TO)
                assert is_made, "sums that C++ does not make"
            each.add(held[1] if held else y, y)
        for each in self.outputs:
            each.add(y0, y)
        for number, add in self.sums:
            add(sources[number], y)
        return held

    @staticmethod
    def of(bounds: Sequence[Bound], member: int, table: RowTable) -> InPlace | None:
        """None: one does not."""
        each = [bound.adds(member) for bound in bounds]
        known = [adds for adds in each if adds is not None]
        if len(known) < len(each):
            return None
        inputs = tuple(own.input_change for own in known if own.input_change is not None)
        outputs = tuple(own.output_change for own in known if own.output_change is not None)
        products = tuple(own.product_change for own in known if own.product_change is not None)
        sums = tuple((n, own.sums) for n, own in enumerate(known) if own.sums is not None)
        joining = [own.joining for own in known if own.sums is not None]
        is_all = len(sums) == 1 and not (inputs or outputs)
        is_hidden = _is_one_of_each(inputs, outputs, table)
        return InPlace(inputs, outputs, is_hidden, products, sums, joining[0] if is_all else None)


def _is_one_of_each(some: Sequence[SideAdd], others: Sequence[SideAdd], table: RowTable) -> bool:
    """Whether a row is changed by one of these and by one of those."""
    if not (some and others):
        return False
    slots = [{slot for own in side for slot in own.slots} for side in (some, others)]
    return any(all(any(slot in own for slot, _ in span.pairs) for own in slots) for span in table.spans)
