"""Several bound operators as one, where uses fall into kinds that run by themselves."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from timbre_server.operators.contract import Bound, Change


class JoinedSums(Bound):
    """What each adds from the input alone, one after the other."""

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self._bounds = bounds

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        each = [bound.sums(x_TI) for bound in self._bounds]
        return [[change for changes in own for change in changes] for own in zip(*each, strict=True)]
