"""Every operator against its own meaning, row by row, whatever the crowd."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.program import Part, owned_tensors
from timbre_server.operators import pooling
from timbre_server.operators.catalogue import all_operators, why_not
from timbre_server.operators.contract import Bound, Change, Operator, OwnProduct, Uses
from timbre_server.operators.native.block import NativePackedDense
from timbre_server.operators.native.projected import NativePackedProjected
from timbre_server.operators.row_table import RowTable, Span

# Where there is no compiler, tests/operators/test_native.py skips and says so.
OPERATORS = {
    type(operator).__name__: operator
    for operator in (*all_operators(), *(() if why_not("native") else all_operators(kernels="native")))
}

CROWDS = {
    "one row of one adapter": [Span(1, ((0, 1.0),))],
    "all rows of one adapter": [Span(24, ((0, 1.0),))],
    "identical": [Span(1, ((1, 1.0),))] * 5,
    "distinct": [Span(1, ((slot, 1.0),)) for slot in (3, 0, 2, 1)],
    "uniform with base rows": [
        Span(1),
        Span(1, ((2, 1.0),)),
        Span(3),
        Span(2, ((0, 1.0),)),
        Span(1, ((2, 1.0),)),
    ],
    "prefill beside decode": [Span(1, ((1, 1.0),)), Span(40, ((2, 1.0),)), Span(1), Span(17, ((0, 1.0),))],
    "mixes": [
        Span(2, ((0, 0.7), (1, 0.3))),
        Span(1, ((1, -1.5),)),
        Span(20, ((2, 0.25), (0, 2.0), (3, 0.5))),
        Span(1),
        Span(1, ((3, 1.0),)),
    ],
}


RandomPart = Callable[[Operator[Any], int, int, torch.Generator], Part]


def by_meaning(
    operator: Operator[Any],
    parts: Sequence[Part],
    weights: Sequence[float],
    x_TI: Tensor,
    y_TO: Tensor,
    weight_OI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The summed input change and change of rows that all have the same parts."""
    input_change, change = torch.zeros_like(x_TI), torch.zeros_like(y_TO)
    for part, weight in zip(parts, weights, strict=True):
        meaning = operator.meaning(part, x_TI, y_TO)
        if meaning.input_change_TI is not None:
            input_change += weight * meaning.input_change_TI
        if meaning.change_TO is not None:
            change += weight * meaning.change_TO
        change += weight * summed([produced(meaning.own_product, weight_OI)], change)
    return input_change, change


def produced(own: OwnProduct | None, weight_OI: Tensor | None) -> Change | None:
    """The base product that an operator asks for."""
    if own is None or weight_OI is None:
        return None
    return Change(own.gain_NO * (own.x_NI @ weight_OI.T), own.rows_N)


def summed(changes: Sequence[Change | None], like: Tensor) -> Tensor:
    total, every = torch.zeros_like(like), torch.arange(len(like))
    for change in changes:
        if change is not None:
            rows = change.rows_N if isinstance(change.rows_N, Tensor) else every[change.rows_N or slice(None)]
            total.index_add_(0, rows, change.values_NO)
    return total


def check_against_meaning(
    operator: Operator[Any],
    table: RowTable,
    shape: tuple[int, int],
    random_part: RandomPart,
    generator: torch.Generator,
) -> None:
    in_features, first_out = shape
    members = (first_out, first_out // 2 + 1)
    # The second member is adapted by only some of the adapters. Adapter 0 has two parts wherever it acts.
    uses: Uses[Any] = [
        {
            slot: [random_part(operator, in_features, out, generator) for _ in range(2 if slot == 0 else 1)]
            for slot in slots
        }
        for out, slots in zip(members, (range(4), (0, 3)), strict=True)
    ]
    x_TI = torch.randn(table.num_rows, in_features, generator=generator)
    outputs = [torch.randn(table.num_rows, out, generator=generator) for out in members]
    weights = [torch.randn(out, in_features, generator=generator) / 4 for out in members]

    bound = operator.bind(uses, table)

    for member, y_TO in enumerate(outputs):
        sums = bound.sums(x_TI)
        shared = list(sums[member]) if sums else []
        own_product = produced(bound.own_product(member, x_TI), weights[member])
        input_change = summed([bound.input_change(member, x_TI)], x_TI)
        product_TO = (x_TI + input_change) @ weights[member].T
        product_change = bound.product_change(member, product_TO)
        change = summed([*shared, product_change, bound.output_change(member, y_TO), own_product], y_TO)
        row = 0
        for span in table.spans:
            own = [(p, w) for slot, w in span.pairs for p in uses[member].get(slot, ())]
            rows = slice(row, row + span.num_rows)
            parts, own_weights = [p for p, _ in own], [w for _, w in own]
            expected = by_meaning(operator, parts, own_weights, x_TI[rows], y_TO[rows], weights[member])
            torch.testing.assert_close(input_change[rows], expected[0], atol=1e-4, rtol=1e-4)
            near = 1e-1 if isinstance(operator, NativePackedDense | NativePackedProjected) else 1e-4
            torch.testing.assert_close(change[rows], expected[1], atol=near, rtol=near)
            row += span.num_rows
        check_adds(bound, member, (x_TI, input_change), (y_TO, change), product_TO)


def check_adds(
    bound: Bound,
    member: int,
    x_and_change: tuple[Tensor, Tensor],
    y_and_change: tuple[Tensor, Tensor],
    product_TO: Tensor,
) -> None:
    """Where there are any, they add the same changes by themselves."""
    adds = bound.adds(member)
    if adds is None:
        return
    (x_TI, input_change), (y_TO, change) = x_and_change, y_and_change
    changed_TI, changed_TO = x_TI.clone(), y_TO.clone()
    if adds.input_change is not None:
        adds.input_change.add(x_TI, changed_TI)
        alone_TI = x_TI.clone()
        adds.input_change.add(alone_TI, alone_TI)
        assert torch.equal(alone_TI, changed_TI)
    if adds.output_change is not None:
        adds.output_change.add(changed_TO, changed_TO)
    if adds.product_change is not None:
        adds.product_change.add(product_TO, changed_TO)
    if adds.sums is not None:
        adds.sums(bound.source(x_TI), changed_TO)
        narrow_TI = x_TI.bfloat16()
        of_narrow_TO, of_wide_TO = torch.zeros_like(y_TO), torch.zeros_like(y_TO)
        adds.sums(bound.source(narrow_TI), of_narrow_TO)
        adds.sums(bound.source(narrow_TI.float()), of_wide_TO)
        torch.testing.assert_close(of_narrow_TO, of_wide_TO, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed_TI, x_TI + input_change, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(changed_TO, y_TO + change, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [(16, 24), (15, 9), (32, 32), (8, 27)], ids=str)
@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_bound_operator_gives_each_row_the_weighted_sum_of_meanings(
    name: str, crowd: str, shape: tuple[int, int], random_part: RandomPart
) -> None:
    generator = torch.Generator().manual_seed(len(name) * 1000 + len(crowd) + shape[0])
    check_against_meaning(OPERATORS[name], RowTable(CROWDS[crowd]), shape, random_part, generator)


@pytest.mark.parametrize("room", [0, 3000])
@pytest.mark.parametrize("crowd", ["distinct", "uniform with base rows", "mixes"])
@pytest.mark.parametrize("name", OPERATORS)
def test_with_room_for_no_copies_or_few_the_numbers_are_the_same(
    name: str, crowd: str, room: int, random_part: RandomPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "MAX_POOLED_BYTES", room)
    generator = torch.Generator().manual_seed(room + len(name) + len(crowd))
    check_against_meaning(OPERATORS[name], RowTable(CROWDS[crowd]), (16, 24), random_part, generator)


def held_by(bound: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that a bound operator keeps."""
    if id(bound) in seen or isinstance(bound, type | str | int | float | None):
        return
    seen.add(id(bound))
    if isinstance(bound, Tensor):
        is_sparse = bound.layout == torch.sparse_csr
        yield from (bound.crow_indices(), bound.col_indices(), bound.values()) if is_sparse else (bound,)
        return
    if isinstance(bound, FunctionType):
        inside = [cell.cell_contents for cell in bound.__closure__ or ()]
    elif isinstance(bound, dict):
        inside = list(bound.values())
    elif isinstance(bound, list | tuple):
        inside = list(bound)
    else:
        names = [name for kind in type(bound).__mro__ for name in getattr(kind, "__slots__", ())]
        inside = [getattr(bound, name, None) for name in names] + list(
            getattr(bound, "__dict__", {}).values()
        )
    for each in inside:
        yield from held_by(each, seen)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_room_a_bind_copies_nothing_for_each_row(
    name: str, random_part: RandomPart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "MAX_POOLED_BYTES", 0)
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(9)
    parts = {slot: [random_part(operator, 128, 256, generator) for _ in range(2)] for slot in range(8)}

    def held_bytes(rows: int) -> int:
        bound = operator.bind([parts], RowTable([Span(rows, ((slot, 1.0),)) for slot in parts]))
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in held_by(bound, set())
        }
        return sum(storages.values())

    # A few numbers for each row and part: which row it is, with what weight, where its input lies.
    uses_more = (3 - 1) * sum(len(own) for own in parts.values())
    assert held_bytes(3) - held_bytes(1) <= 96 * uses_more


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_part_that_is_not_finite_spoils_its_own_rows_alone(
    name: str, bad: float, random_part: RandomPart, parts: ModuleType
) -> None:
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(6)
    part = random_part(operator, 16, 24, generator)
    spoilt = parts.with_every_float(part, bad)
    x_TI, y_TO = torch.randn(4, 16, generator=generator), torch.randn(4, 24, generator=generator)
    weight_OI = torch.randn(24, 16, generator=generator)
    table = RowTable([Span(1, ((0, 1.0),)), Span(1, ((1, 1.0),)), Span(2, ((0, 0.5),))])

    found = []
    for other in (part, spoilt):
        bound = operator.bind([{0: [part], 1: [other]}], table)
        sums = bound.sums(x_TI)
        own_product = produced(bound.own_product(0, x_TI), weight_OI)
        input_change = summed([bound.input_change(0, x_TI)], x_TI)
        product_change = bound.product_change(0, (x_TI + input_change) @ weight_OI.T)
        changes = [*(sums[0] if sums else ()), product_change, bound.output_change(0, y_TO), own_product]
        change = summed(changes, y_TO)
        found.append(torch.cat([change, input_change], dim=1))

    beside_sound, beside_spoilt = found
    assert not beside_spoilt[1].isfinite().all()
    torch.testing.assert_close(beside_spoilt[[0, 2, 3]], beside_sound[[0, 2, 3]])


@pytest.mark.parametrize("name", OPERATORS)
def test_binding_and_running_modify_neither_parts_nor_input(name: str, random_part: RandomPart) -> None:
    operator = OPERATORS[name]
    generator = torch.Generator().manual_seed(5)
    part = random_part(operator, 16, 24, generator)
    before = [tensor.clone() for tensor in owned_tensors(part)]
    table = RowTable(CROWDS["prefill beside decode"])
    x_TI = torch.randn(table.num_rows, 16, generator=generator)
    x_before = x_TI.clone()

    bound = operator.bind([{slot: [part] for slot in range(3)}], table)
    for _ in range(2):
        bound.sums(x_TI)
        bound.input_change(0, x_TI)
        bound.own_product(0, x_TI)

    assert torch.equal(x_TI, x_before)
    for tensor, value in zip(owned_tensors(part), before, strict=True):
        assert torch.equal(tensor, value)
