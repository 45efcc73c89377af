"""`materialise`: the dense ΔW of adapters, for whoever folds one into the base's weights or exports it.

ΔW is what the operators that serve an adapter make of the identity, so every part that is a change of the
weight alone has one, and a formula stands in one place. Parts that are factors, a table or ΔW itself are
added as they are: a product with the identity would cost more than the result.

Legend: S adapters, N some of the I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from timbre_methods.program import Dense, FromInput, LowRank, Part, TokenRows
from timbre_server.operators.contract import Operator
from timbre_server.operators.row_table import RowTable, Span

ROWS_AT_ONCE = 1024
"""Rows of the identity that run together: what bounds the memory beside the result."""


@runtime_checkable
class AddsChanges(Protocol):
    """An operator that knows a faster way than rows of the identity, for many adapters at once."""

    def add_changes(self, parts_S: Sequence[Sequence[Any]], delta_SOI: Tensor) -> None:
        """Add ΔW of each adapter's parts, all of the operator's kind. ``delta_SOI`` is contiguous."""


def is_change_of_weight(part: Part) -> bool:
    """Whether a part has a ΔW that does not depend on W."""
    return isinstance(part, FromInput)


def materialise(
    parts_S: Sequence[Sequence[Part]], shape: tuple[int, int], operators: Sequence[Operator[Any]]
) -> Tensor:
    """ΔW [S, O, I], float32 and a tensor of its own, of each adapter's parts at one site of shape (O, I).

    It is on the device of the parts, which all satisfy `is_change_of_weight`; an adapter without parts has
    zeros. ``operators`` are those that serve: one for each kind of part.
    """
    by_kind = {operator.part: operator for operator in operators}
    device = next((_device(part) for parts in parts_S for part in parts), None)
    delta_SOI = torch.zeros(len(parts_S), *shape, device=device)
    for kind in dict.fromkeys(type(part) for parts in parts_S for part in parts):
        own_S = [[part for part in parts if type(part) is kind] for parts in parts_S]
        operator: object = by_kind.get(kind)
        if isinstance(operator, AddsChanges):
            operator.add_changes(own_S, delta_SOI)
            continue
        for delta_OI, own in zip(delta_SOI, own_S, strict=True):
            for part in own:
                assert is_change_of_weight(part), f"{kind.__name__} is no change of the weight alone"
                _add(delta_OI, part, by_kind)
    return delta_SOI


def _device(part: Part) -> torch.device:
    found = next(value for name in part.__slots__ if isinstance(value := getattr(part, name), Tensor))
    return found.device


def _add(delta_OI: Tensor, part: Part, by_kind: dict[type[Part], Operator[Any]]) -> None:
    if isinstance(part, Dense):
        delta_OI += part.delta_OI
    elif isinstance(part, LowRank):
        delta_OI.addmm_(part.b_OR.float(), part.a_RI.float())
    elif isinstance(part, TokenRows):
        delta_OI.index_add_(1, part.tokens_K, part.rows_KO.T)
    else:
        _add_by_rows(delta_OI, part, by_kind[type(part)])


def _add_by_rows(delta_OI: Tensor, part: Part, operator: Operator[Any]) -> None:
    """Column i of ΔW is what row i of the identity becomes."""
    in_features = delta_OI.shape[1]
    for first in range(0, in_features, ROWS_AT_ONCE):
        delta_ON = delta_OI[:, first : first + ROWS_AT_ONCE]
        count = delta_ON.shape[1]
        x_NI = delta_OI.new_zeros(count, in_features)
        x_NI.diagonal(first).fill_(1.0)
        bound = operator.bind([{0: [part]}], RowTable([Span(count, ((0, 1.0),))], delta_OI.device))
        (changes,) = bound.sums(x_NI)
        for change in changes:
            rows = slice(None) if change.rows_N is None else change.rows_N
            delta_ON.T[rows] += change.values_NO
