"""Routers in C++: the gates of all rows of a group by one call, whatever their adapters' rules.

Legend: T rows of the batch, N rows of one adapter, I in, E experts, K gates of one adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from timbre_methods.routing import Router, Rule
from timbre_server.native.library import ADDRESS, NUMBER, kernel, num_threads
from timbre_server.operators.live_rows import rows_fields
from timbre_server.operators.native.uses import Fields, address_of, structures
from timbre_server.operators.router import Routers, router_gates
from timbre_server.operators.row_table import RowTable, Segment, Span

_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Rule).items()}
"""Of the fields that are named choices, in the order of the enumerations of ``router.cpp``."""


class _Rule(ctypes.Structure):
    """``RouterRule`` of ``router.cpp``."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("reads", "logits", "keep", "top_k", "gate", "has_floor", "again")
        ),
        *((name, ctypes.c_float) for name in ("scale", "top_p", "floor")),
    ]

    @staticmethod
    def of(rule: Rule) -> _Rule:
        reads, logits, keep, gate = (
            _CHOICES[name].index(getattr(rule, name)) for name in ("reads", "logits", "keep", "gate")
        )
        floor = 0.0 if rule.floor is None else rule.floor
        has_floor = rule.floor is not None
        return _Rule(
            reads, logits, keep, rule.top_k, gate, has_floor, rule.again, rule.scale, rule.top_p, floor
        )


def router_fields(router: Router) -> tuple[Fields, object]:
    """What ``RouterUse`` of ``router.cpp`` begins with, before its rows; and what has to be held for it."""
    rule, given = _Rule.of(router.rule), (router.weight_EI, router.bias_E, router.preference_E)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in given]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (ctypes.addressof(rule), *addresses, router.num_experts), (rule, tensors)


class NativeRouters(Routers):
    """`Routers` by ``router.cpp``."""

    def __init__(self, routers: Sequence[tuple[Segment, Sequence[Router]]]) -> None:
        self._held: list[object] = []
        self._shapes = [(s.rows_N.shape[0], sum(r.num_experts for r in own)) for s, own in routers]
        self._sizes = [count * num_gates for count, num_gates in self._shapes]
        uses: list[Fields] = []
        first, work = 0, 0
        for (segment, own), (count, num_gates) in zip(routers, self._shapes, strict=True):
            self._held.append(segment)
            column, rows = first, rows_fields(segment)
            for router in own:
                uses.append(self._use(rows, router, column, num_gates))
                column += router.num_experts
                work += count * router.weight_EI.numel()
            first += count * num_gates
        self._uses, self._work = structures(uses), work
        self._first, self._count = address_of(self._uses), len(uses)
        self._run = kernel("timbre_gates", ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS)

    def _use(self, rows: Fields, router: Router, first: int, stride: int) -> Fields:
        """``RouterUse`` of ``router.cpp``."""
        fields, held = router_fields(router)
        self._held.append(held)
        return *fields, *rows, first, stride

    def gates(self, x_TI: Tensor) -> Sequence[Tensor]:
        x_TI, gates = x_TI.contiguous(), torch.empty(sum(self._sizes))
        self._run(
            self._first,
            self._count,
            x_TI.data_ptr(),
            x_TI.shape[1],
            gates.data_ptr(),
            num_threads(self._work),
        )
        pieces = gates.split_with_sizes(self._sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]


def agree() -> bool:
    """Whether routers of several rules, as they were compiled, give what PyTorch gives."""
    generator = torch.Generator().manual_seed(0)
    weight_EI, x_TI = (torch.randn(n, 24, generator=generator) for n in (5, 7))
    (segment,) = RowTable([Span(len(x_TI), ((0, 1.0),))]).segments
    routers = [
        Router(weight_EI, rule, weight_EI[:, 0], weight_EI[:, 1])
        for rule in (
            Rule(reads="normalised", logits="unit", scale=3.0, keep="top_p", top_p=0.6, gate="renormalised"),
            Rule(logits="absolute", keep="top_k", top_k=3, gate="logit", floor=1.0, again=True),
            Rule(keep="top_k", top_k=2),
        )
    ]
    expected = torch.cat([router_gates(router, x_TI) for router in routers], dim=1)
    return torch.allclose(NativeRouters([(segment, routers)]).gates(x_TI)[0], expected, atol=1e-5, rtol=1e-4)
