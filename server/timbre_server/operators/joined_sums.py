"""Several bound operators as one, where uses fall into kinds that run by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timbre_server.operators.contract import Adds, Bound, Change


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

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        each = [bound.sums(x_TI) for bound in self._bounds]
        return [[change for changes in own for change in changes] for own in zip(*each, strict=True)]

    def adds(self, member: int) -> Adds | None:
        each = [bound.adds(member) for bound in self._bounds]
        if any(own is None or own.output_change is not None for own in each):
            return None
        sums = [(n, own.sums) for n, own in enumerate(each) if own is not None and own.sums is not None]

        def add(sources: Sequence[Any], y_TO: Tensor) -> None:
            for number, own in sums:
                own(sources[number], y_TO)

        return Adds(sums=add if sums else None)

    def source(self, x_TI: Tensor) -> Sequence[Any]:
        return [bound.source(x_TI) for bound in self._bounds]

    @property
    def takes_any_type(self) -> bool:
        return all(bound.takes_any_type for bound in self._bounds)

    @property
    def outlasts_tables(self) -> bool:
        return all(bound.outlasts_tables for bound in self._bounds)
