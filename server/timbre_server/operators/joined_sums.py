"""Several bound operators as one, where uses fall into kinds that run by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from timbre_server.operators.contract import Adds, Bound, Change


class JoinedSums(Bound):
    """What each adds, one after the other: from the input alone, but for one at most."""

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self._bounds = bounds

    @property
    def reads_input_alone(self) -> bool:
        return all(bound.reads_input_alone for bound in self._bounds)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        changes = (bound.output_change(member, y_TO) for bound in self._bounds)
        return next((change for change in changes if change is not None), None)

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        each = [bound.sums(x_TI) for bound in self._bounds]
        return [[change for changes in own for change in changes] for own in zip(*each, strict=True)]

    def adds(self, member: int) -> Adds | None:
        each = [bound.adds(member) for bound in self._bounds]
        if any(own is None for own in each):
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
