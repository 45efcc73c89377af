"""A kernel's operator against its twin: every crowd, every hook of a bound operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import basis_on
from timbre_methods.program import Basis, Part
from timbre_server.operators.contract import Bound, Change, Operator, Uses
from timbre_server.operators.row_table import RowTable, Span

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CROWDS: dict[str, list[Span]] = {
    "identical": [Span(1, ((1, 1.0),))] * 3,
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (3, 0, 2, 1)],
    "uniform": [Span(1), Span(1, ((2, 1.0),)), Span(1, ((0, 1.0),)), Span(1, ((2, -0.5),))],
    "zipf": [Span(1, ((slot, 1.0),)) for slot in (0, 1, 0, 2, 0)],
    "mixes": [Span(1, ((0, 0.7), (1, 0.3))), Span(1), Span(2, ((2, 0.25), (0, 2.0), (3, 0.5)))],
    "prefill": [Span(1, ((1, 1.0),)), Span(5, ((2, 1.0),)), Span(1)],
}

OUTPUTS = (24, 13)

Totals = list[tuple[Tensor, Tensor]]
"""Of each member: what is added to its input, and to its output."""


def totals(bound: Bound, x_TI: Tensor, outputs: Sequence[Tensor]) -> Totals:
    """Own products are taken with a weight of fixed numbers."""
    sums = bound.sums(x_TI)
    found = []
    for member, y_TO in enumerate(outputs):
        change, input_change = torch.zeros_like(y_TO), torch.zeros_like(x_TI)
        for each in [*(sums[member] if sums else ()), bound.output_change(member, y_TO)]:
            add(change, each)
        add(input_change, bound.input_change(member, x_TI))
        own = bound.own_product(member, x_TI)
        if own is not None:
            weight_OI = torch.linspace(-1, 1, y_TO.shape[1] * x_TI.shape[1], device=x_TI.device)
            product_NO = own.x_NI @ weight_OI.view(y_TO.shape[1], -1).T
            add(change, Change(own.gain_NO * product_NO, own.rows_N))
        found.append((input_change, change))
    return found


def add(total: Tensor, change: Change | None) -> None:
    if change is not None:
        every = torch.arange(len(total), device=total.device)
        rows = change.rows_N if isinstance(change.rows_N, Tensor) else every[change.rows_N or slice(None)]
        total.index_add_(0, rows, change.values_NO)


def on_device(part: Any) -> Any:
    """The part where kernels run; bases stay shared, and places on the CPU."""
    changes: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            changes[field.name] = value.to(DEVICE)
        elif isinstance(value, Basis):
            changes[field.name] = basis_on(value, DEVICE, lambda side: side.to(DEVICE))
    return replace(part, **changes)


def check(
    kernels: Operator[Any],
    twin: Operator[Any],
    draw: Callable[[int, torch.Generator], Part],
    crowd: str,
    in_features: int,
) -> Bound:
    """Two members, the second adapted by some; adapter 0 has two parts. ``draw`` makes a part for so many
    outputs. Rows of the base stay as they are. Gives what the kernels' operator bound."""
    generator = torch.Generator().manual_seed(len(crowd) + in_features)
    table = RowTable(CROWDS[crowd], DEVICE)
    uses: Uses[Any] = [
        {slot: [on_device(draw(out, generator)) for _ in range(1 + (slot == 0))] for slot in slots}
        for out, slots in zip(OUTPUTS, (range(4), (0, 3)), strict=True)
    ]
    x_TI = torch.randn(table.num_rows, in_features, generator=generator).to(DEVICE)
    outputs = [torch.randn(table.num_rows, out, generator=generator).to(DEVICE) for out in OUTPUTS]
    before = x_TI.clone()

    bound = kernels.bind(uses, table)
    found = totals(bound, x_TI, outputs)
    expected = totals(twin.bind(uses, table), x_TI, outputs)

    assert torch.equal(x_TI, before)
    is_base_T = torch.tensor([not span.pairs for span in table.spans for _ in range(span.num_rows)])
    for own, wanted in zip(found, expected, strict=True):
        for value, right in zip(own, wanted, strict=True):
            assert not value[is_base_T].any()
            torch.testing.assert_close(value, right, atol=2e-5, rtol=2e-5)
    return bound
