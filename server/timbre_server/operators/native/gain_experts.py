"""Experts in C++ that scale and shift the output.

Legend: T rows of the batch, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from timbre_methods.program import Diagonal
from timbre_methods.routing import Routed, Router, Scouted
from timbre_server.operators.contract import Adds, Bound, Change, Members
from timbre_server.operators.native.diagonal import prepared_gains
from timbre_server.operators.native.low_rank_experts import AdapterGates
from timbre_server.operators.native.prepared import PreparedParts
from timbre_server.operators.native.sides import PreparedSides


def prepared_gains_of(
    members: Members[Routed], columns: Mapping[Router | Scouted, int], gates: AdapterGates
) -> PreparedSides:
    """``columns``: of the first gate of each router."""
    each = [
        [
            prepared_gains(inner, gates, columns[part.router] + number)
            for part in parts
            for number, expert in enumerate(part.experts)
            for inner in expert
            if isinstance(inner, Diagonal)
        ]
        for parts in members
    ]
    return {(member, "output"): own for member, own in PreparedParts(each).members.items()}


@dataclass(frozen=True, slots=True)
class WithGains(Bound):
    """Experts, and those that scale the output by gates that the others' source writes."""

    experts: Bound
    gains: Bound

    @property
    def reads_input_alone(self) -> bool:
        return False

    @property
    def takes_any_type(self) -> bool:
        return self.experts.takes_any_type

    @property
    def outlasts_tables(self) -> bool:
        return self.experts.outlasts_tables

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return self.experts.sums(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        """After `sums` of the same step."""
        return self.gains.output_change(member, y_TO)

    def adds(self, member: int) -> Adds | None:
        own, gains = self.experts.adds(member), self.gains.adds(member)
        assert own is not None, "experts' kernels add by themselves"
        assert gains is not None, "and so do gains"
        is_asked = own.sums is not None or gains.output_change is None
        return replace(gains, sums=own.sums if is_asked else _nothing)

    def source(self, x_TI: Tensor) -> Any:
        return self.experts.source(x_TI)


def _nothing(source: object, y_TO: Tensor) -> None:
    """For whose sake a source is made all the same."""
