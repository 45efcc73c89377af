"""Routers: the gates of experts, row by row, for many adapters at once.

Adapters with a row or two each run as (row, router) pairs in one batched product for each shape and rule;
those with more rows, or without room for copies, get a product of their own. `timbre_methods.routing.Rule`
says what is computed.

Legend: T rows of the batch, N rows of one adapter, P pairs, I in, E experts, L places of a scout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from timbre_methods.routing import Router, Rule, Scout
from timbre_server.operators.pooling import PoolRoom
from timbre_server.operators.row_table import Segment

MIN_ROWS_ALONE = 4
NORMALISED_EPSILON = 1e-5


class Routers(ABC):
    """Some routers, those of one adapter together with its rows, ready for one table."""

    @abstractmethod
    def __init__(self, routers: Sequence[tuple[Segment, Sequence[Router]]]) -> None:
        """Each segment has a router at least."""

    @abstractmethod
    def gates(self, x_TI: Tensor) -> Sequence[Tensor]:
        """``[N, K]`` of each segment: all its routers' side by side."""


class BoundRouters(Routers):
    """`Routers` in PyTorch."""

    def __init__(self, routers: Sequence[tuple[Segment, Sequence[Router]]]) -> None:
        self._num_segments, room = len(routers), PoolRoom()
        self._batches: list[_Alone | _Pairs] = []
        pooled: dict[object, list[tuple[int, Segment, Sequence[Router]]]] = {}
        for place, (segment, own) in enumerate(routers):
            count, kinds = len(segment.rows_N), {_kind(router) for router in own}
            num_bytes = count * sum(router.weight_EI.nbytes for router in own)
            if count >= MIN_ROWS_ALONE or len(kinds) > 1 or not room.take(num_bytes):
                self._batches.append(_Alone(place, segment, own))
            else:
                pooled.setdefault(kinds.pop(), []).append((place, segment, own))
        self._batches += [_Pairs.of(each) for each in pooled.values()]

    def gates(self, x_TI: Tensor) -> Sequence[Tensor]:
        found: dict[int, Tensor] = {}
        for batch in self._batches:
            found.update(batch.gates(x_TI))
        return [found[place] for place in range(self._num_segments)]


def _kind(router: Router) -> object:
    """Equal for routers that run in one product."""
    return router.rule, router.weight_EI.shape, router.bias_E is None, router.preference_E is None


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter by itself."""

    place: int
    segment: Segment
    routers: Sequence[Router]

    def gates(self, x_TI: Tensor) -> dict[int, Tensor]:
        x_NI = x_TI[self.segment.index]
        return {self.place: side_by_side([router_gates(router, x_NI) for router in self.routers])}


@dataclass(frozen=True, slots=True, eq=False)
class _Pairs:
    """Routers of one kind with few rows: stacked, row after row, a row's own one after the other. So what
    they give lies as it is asked for, and no adapter takes a launch of its own."""

    places: tuple[int, ...]
    counts: tuple[int, ...]
    """Pairs of each place."""
    rows: tuple[int, ...]
    """Of each place."""
    rows_P: Tensor
    weight_PEI: Tensor
    bias_PE: Tensor | None
    preference_PE: Tensor | None
    rule: Rule

    @staticmethod
    def of(routers: Sequence[tuple[int, Segment, Sequence[Router]]]) -> _Pairs:
        each = [router for _, segment, own in routers for _ in range(len(segment.rows_N)) for router in own]
        return _Pairs(
            tuple(place for place, _, _ in routers),
            tuple(len(segment.rows_N) * len(own) for _, segment, own in routers),
            tuple(len(segment.rows_N) for _, segment, _ in routers),
            torch.cat([segment.rows_N.repeat_interleave(len(own)) for _, segment, own in routers]),
            torch.stack([router.weight_EI for router in each]),
            _stacked([router.bias_E for router in each]),
            _stacked([router.preference_E for router in each]),
            each[0].rule,
        )

    def gates(self, x_TI: Tensor) -> dict[int, Tensor]:
        x_PI = _read(self.rule, x_TI[self.rows_P])
        logits_PE = torch.bmm(self.weight_PEI, x_PI.unsqueeze(2)).squeeze(2)
        if self.bias_PE is not None:
            logits_PE = logits_PE + self.bias_PE
        gates_PE = ruled(self.rule, logits_PE, self.preference_PE)
        found = gates_PE.split_with_sizes(self.counts)
        return {
            place: gates.reshape(rows, -1)
            for place, rows, gates in zip(self.places, self.rows, found, strict=True)
        }


def side_by_side(gates: Sequence[Tensor]) -> Tensor:
    return gates[0] if len(gates) == 1 else torch.cat(list(gates), dim=1)


def _stacked(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return torch.stack(present) if present else None


def router_gates(router: Router, x_NI: Tensor) -> Tensor:
    """``[N, E]`` of rows that all use one router: its meaning."""
    logits_NE = torch.nn.functional.linear(_read(router.rule, x_NI), router.weight_EI, router.bias_E)
    return ruled(router.rule, logits_NE, router.preference_E)


def scout_gates(scout: Scout, h_NI: Tensor) -> Tensor:
    """``[N, L, E]`` of what the base alone made of some rows, in float32."""
    v_NI = h_NI.float()
    for number, (weight_OI, bias_O) in enumerate(zip(scout.weights, scout.biases, strict=True)):
        v_NI = torch.nn.functional.linear(v_NI.relu() if number else v_NI, weight_OI, bias_O)
    return ruled(scout.rule, v_NI.view(len(h_NI), -1, scout.num_experts))


def _read(rule: Rule, x_NI: Tensor) -> Tensor:
    if rule.reads == "normalised":
        return layer_norm(x_NI, x_NI.shape[-1:], eps=NORMALISED_EPSILON)
    return x_NI


def ruled(rule: Rule, logits_NE: Tensor, preference_NE: Tensor | None = None) -> Tensor:
    """Gates from logits, by the rule from its step 2 on."""
    if rule.logits == "absolute":
        logits_NE = logits_NE.abs()
    elif rule.logits == "unit":
        smallest = torch.finfo(logits_NE.dtype).tiny
        logits_NE = logits_NE / logits_NE.norm(dim=-1, keepdim=True).clamp_min(smallest)
    scaled_NE = logits_NE * rule.scale
    kept_NE = _kept(rule, scaled_NE, preference_NE)
    gates_NE = _gated(rule, scaled_NE, kept_NE)
    if kept_NE is not None:
        gates_NE = gates_NE.masked_fill(~kept_NE, 0.0)
    if rule.floor is not None:
        gates_NE = gates_NE.masked_fill(logits_NE < rule.floor, 0.0)
    if rule.again:
        left_out_NE = gates_NE == 0
        gates_NE = torch.softmax(gates_NE.masked_fill(left_out_NE, -torch.inf), -1)
        gates_NE = gates_NE.masked_fill(left_out_NE, 0.0)
    return gates_NE


def _kept(rule: Rule, scaled_NE: Tensor, preference_NE: Tensor | None) -> Tensor | None:
    """Which experts act; None: all. Stable sorts put the first of equal ones first."""
    if rule.keep == "all":
        return None
    preferred_NE = scaled_NE if preference_NE is None else scaled_NE + preference_NE
    order_NE = torch.sort(preferred_NE, dim=-1, descending=True, stable=True).indices
    if rule.keep == "top_k":
        best_NK = order_NE[..., : rule.top_k]
        return torch.zeros_like(scaled_NE, dtype=torch.bool).scatter_(-1, best_NK, True)
    mass_NE = torch.softmax(scaled_NE, -1).gather(-1, order_NE)
    before_NE = mass_NE.cumsum(-1) - mass_NE
    return torch.zeros_like(scaled_NE, dtype=torch.bool).scatter_(-1, order_NE, before_NE <= rule.top_p)


def _gated(rule: Rule, scaled_NE: Tensor, kept_NE: Tensor | None) -> Tensor:
    """Gates of those that are kept; what it gives the others counts for nothing."""
    if rule.gate == "one":
        return torch.ones_like(scaled_NE)
    if rule.gate == "logit":
        return scaled_NE
    if rule.gate == "renormalised" and kept_NE is not None:
        scaled_NE = scaled_NE.masked_fill(~kept_NE, -torch.inf)
    return torch.softmax(scaled_NE, -1)
