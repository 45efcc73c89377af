"""Routers in C++: the gates of all rows of a group by one call, whatever their adapters' rules.

Legend: T rows of the batch, N rows of one adapter, I in, E experts, K gates of one adapter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import get_args, get_type_hints

import torch
from torch import Tensor

from timbre_methods.routing import Router, Rule
from timbre_server.native.formats import format_of
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel, num_threads
from timbre_server.operators.live_rows import rows_fields
from timbre_server.operators.native.low_rank_experts import AdapterGates
from timbre_server.operators.native.prepared import Prepared, PreparedParts
from timbre_server.operators.native.structures import Fields, address_of, addresses_of, structures
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


class AdapterRouters:
    """Those of one adapter at a group side by side, without its rows."""

    def __init__(self, routers: Sequence[Router]) -> None:
        self.routers = tuple(routers)
        self.sizes = tuple(router.num_experts for router in routers)
        self.gates = AdapterGates(sum(self.sizes))
        columns = accumulate(self.sizes, initial=0)
        fields, held = zip(*map(_router_fields, routers, columns), strict=False)
        own_routers = structures(fields)
        work = sum(router.weight_EI.numel() for router in routers)
        part = Prepared(  # ``AdapterRouters`` of ``router.cpp``.
            (address_of(own_routers), len(fields), self.gates.address),
            (0, routers[0].weight_EI.shape[1]),
            work,
            (held, own_routers, self.gates),
        )
        self.parts = PreparedParts([[part]]).members[0]


def _router_fields(router: Router, column: int) -> tuple[Fields, object]:
    """``Router`` of ``router.cpp``, and what has to be held for it."""
    rule, given = _Rule.of(router.rule), (router.weight_EI, router.bias_E, router.preference_E)
    tensors = [None if tensor is None else tensor.contiguous() for tensor in given]
    addresses = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    return (ctypes.addressof(rule), *addresses, router.num_experts, column), (rule, tensors)


def write_gates(uses: int, x_TI: Tensor, called: int, threads: int) -> None:
    """The gates of all that use them. ``uses``: the address of ``Uses`` of ``lanes.h``, ``called``: of
    ``Called`` of ``router.cpp``, or 0; x is contiguous, in float32 or bfloat16."""
    in_features = x_TI.shape[-1]
    x = x_TI.data_ptr(), format_of(x_TI), x_TI.numel() // in_features, in_features
    kernel("timbre_gates", ADDRESS, ADDRESS, NUMBER, ROWS, NUMBER, ADDRESS)(uses, *x, called, threads)


class NativeRouters(Routers):
    """`Routers` by ``router.cpp``."""

    def __init__(self, routers: Sequence[tuple[Segment, Sequence[Router]]]) -> None:
        self._adapters = [(segment, AdapterRouters(own)) for segment, own in routers]
        self._rows = structures([rows_fields(segment) for segment, _ in self._adapters])
        rows = addresses_of(self._rows, len(self._adapters))
        parts = (own.parts.addresses[0] for _, own in self._adapters)
        self._each = structures(list(zip(parts, rows, strict=True)))
        self._uses = structures([(address_of(self._each), len(rows), 0)])
        self._work = sum(len(segment.rows_N) * own.parts.work for segment, own in self._adapters)

    def gates(self, x_TI: Tensor) -> Sequence[Tensor]:
        for segment, own in self._adapters:
            own.gates.put(torch.empty(len(segment.rows_N), sum(own.sizes)))
        write_gates(address_of(self._uses), x_TI.contiguous(), 0, num_threads(self._work))
        return [own.gates.gates_NK for _, own in self._adapters]


def agree() -> bool:
    """Whether routers of several rules, as they were compiled, give what PyTorch gives."""
    generator = torch.Generator().manual_seed(0)
    weight_EI, x_TI = (torch.randn(n, 72, generator=generator) for n in (5, 7))
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
