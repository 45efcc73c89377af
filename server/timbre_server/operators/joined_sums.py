"""Several bound operators as one, where uses fall into kinds that run by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timbre_server.operators.contract import Add, Adds, Bound, Change


@dataclass(frozen=True, slots=True)
class _AddAll:
    """Equal where it adds the same."""

    sums: tuple[tuple[int, Add], ...]

    def __call__(self, sources: Sequence[Any], y_TO: Tensor) -> None:
        for number, add in self.sums:
            add(sources[number], y_TO)


class JoinedSums(Bound):
    """What each adds, one after the other; by itself only where all do from the input alone."""

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self._bounds = bounds

    @property
    def reads_input_alone(self) -> bool:
        return all(bound.reads_input_alone for bound in self._bounds)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        each = [bound.output_change(member, y_TO) for bound in self._bounds]
        changes = [change for change in each if change is not None]
        if len(changes) < 2:
            return changes[0] if changes else None
        every_T = torch.arange(len(y_TO), device=y_TO.device)
        rows = [every_T if change.rows_N is None else every_T[change.rows_N] for change in changes]
        return Change(torch.cat([change.values_NO for change in changes]), torch.cat(rows))

    @property
    def takes_any_type(self) -> bool:
        """Each gets what it gets where it is alone: in another type the bits of its sums are others."""
        return True

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        each = [bound.sums(x_TI if bound.takes_any_type else x_TI.float()) for bound in self._bounds]
        return [[change for changes in own for change in changes] for own in zip(*each, strict=True)]

    def adds(self, member: int) -> Adds | None:
        sums: list[tuple[int, Add]] = []
        for number, own in enumerate(bound.adds(member) for bound in self._bounds):
            if own is None or own.input_change or own.output_change or own.product_change:
                return None
            if own.sums is not None:
                sums.append((number, own.sums))
        return Adds(sums=_AddAll(tuple(sums)) if sums else None)

    def source(self, x_TI: Tensor) -> Sequence[Any]:
        return [bound.source(x_TI) for bound in self._bounds]

    @property
    def outlasts_tables(self) -> bool:
        return all(bound.outlasts_tables for bound in self._bounds)
