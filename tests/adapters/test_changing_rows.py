"""Groups of layers whose rows and adapters come and go: what stands from table to table, and what it gives.

Legend: T rows, I in, O out, R ranks, N coefficients.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from random_parts import (
    IN,
    KINDS,
    PATHS,
    SIZES,
    gain_on_input,
    gain_on_output,
    low_rank,
    numbers,
    program,
    scaled_rotation,
    sparse,
    spectral,
)
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Diagonal, Part
from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.adapted_linear import AdaptedLinear
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.adapters.slot_programs import MAX_IDLE_OPEN
from timbre_server.operators.catalogue import Kernels, all_operators
from timbre_server.operators.contract import Operator
from timbre_server.operators.native.input_kernels import BoundInputKernels
from timbre_server.operators.native.lanes import NO_ROW, Batch
from timbre_server.operators.row_table import RowTable, Span

NUM_SLOTS = 24


class Group:
    """Two layers that read the same input."""

    def __init__(self, base: nn.ModuleDict, programs: Mapping[int, AdapterProgram], kernels: Kernels) -> None:
        self.rows = ActiveRows()
        self.operators: dict[type[Part], Operator[Any]] = {o.part: o for o in all_operators(kernels=kernels)}
        self.group = AdaptedGroup(PATHS, self.rows, programs, self.operators)
        self._linears = [AdaptedLinear(base[path], base[path], self.group, n) for n, path in enumerate(PATHS)]

    def __call__(self, table: RowTable, x_TI: Tensor) -> list[Tensor]:
        self.rows.begin(table)
        found = [linear(x_TI) for linear in self._linears]
        self.rows.end()
        return found


def any_table(slots: list[int]) -> RowTable:
    """Decode rows, base rows, prompts, and mixes."""

    def span() -> Span:
        rows = random.choice([1, 1, 1, 1, 3, 19])
        own = random.sample(slots, random.choice([0, 1, 1, 1, 1, 1, 2]))
        return Span(rows, tuple((slot, random.choice([1.0, 1.0, 0.25, -2.0])) for slot in own))

    return RowTable([span() for _ in range(random.randint(1, 20))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=pytest.mark.cpp)])
@torch.inference_mode()
def test_a_row_gets_the_bits_that_it_gets_of_a_group_that_never_saw_another(
    kernels: Kernels, kind: str
) -> None:
    random.seed(kind)
    torch.manual_seed(len(kind))
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    programs: dict[int, AdapterProgram] = {}
    standing = Group(base, programs, kernels)
    for _ in range(120):
        for slot in random.sample(range(NUM_SLOTS), NUM_SLOTS if not programs else random.choice([0, 1, 5])):
            if slot in programs:
                standing.group.forget(slot)
            programs[slot] = program(KINDS[kind])
        table = any_table(list(programs))
        x_TI = numbers(table.num_rows, IN)
        new = Group(base, programs, kernels)
        for found, expected in zip(standing(table, x_TI), new(table, x_TI), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.cpp
@pytest.mark.parametrize("make", [low_rank, sparse, gain_on_output, spectral])
@torch.inference_mode()
def test_what_follows_from_an_adapter_alone_is_prepared_once(
    make: Callable[[int], Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {slot: AdapterProgram({path: (make(SIZES[path]),) for path in PATHS}) for slot in range(3)}
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    group = Group(base, programs, "native")
    kind = type(programs[0].sites["q"][0])
    operator, count = group.operators[kind], [0]
    prepared = operator.prepared

    def counted(members: Any) -> Any:
        count[0] += 1
        return prepared(members)

    monkeypatch.setattr(operator, "prepared", counted)
    expected = [1, 2, 2, 3, 3, 4]
    for slots, total in zip([[0], [0, 1], [1], [2, 0], [0, 1, 2], [1]], expected, strict=True):
        if total == 4:
            group.group.forget(1)
        group(RowTable([Span(1, ((slot, 1.0),)) for slot in slots]), numbers(len(slots), IN))
        assert count[0] == total


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=pytest.mark.cpp)])
@torch.inference_mode()
def test_a_slot_that_changes_hands_between_equal_tables_runs_the_new_adapter(kernels: Kernels) -> None:
    """The old one does nothing in this group."""
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    programs = {0: AdapterProgram({})}
    group, x_TI = Group(base, programs, kernels), numbers(3, IN)
    before = group(RowTable([Span(3, ((0, 1.0),))]), x_TI)
    group.group.forget(0)
    programs[0] = AdapterProgram({path: (low_rank(size),) for path, size in SIZES.items()})
    after = group(RowTable([Span(3, ((0, 1.0),))]), x_TI)
    assert not any(map(torch.equal, before, after))


def group_of_both_sides() -> Group:
    """Slot 0 changes a layer's output, slot 1 its input."""
    makes = {0: gain_on_output, 1: gain_on_input}
    programs = {slot: AdapterProgram({"q": (make(SIZES["q"]),)}) for slot, make in makes.items()}
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    return Group(base, programs, "native")


@pytest.mark.cpp
@torch.inference_mode()
def test_an_idle_adapter_does_not_change_the_way_that_others_take() -> None:
    group = group_of_both_sides()
    for slots, sides in (([0], (0, 1)), ([0, 1], (1, 1)), ([0], (0, 1)), ([1], (1, 0))):
        group.rows.begin(RowTable([Span(1, ((slot, 1.0),)) for slot in slots]))
        assert group.group.bound()
        own = group.group.in_place(0)
        assert own is not None
        assert (len(own.inputs), len(own.outputs)) == sides


@pytest.mark.cpp
@torch.inference_mode()
def test_the_output_of_the_unchanged_input_is_asked_for_where_a_row_needs_it() -> None:
    group = group_of_both_sides()
    apart, mixed = [((0, 1.0),), ((1, 1.0),)], [((0, 1.0), (1, 1.0)), ()]
    for uses, is_hidden in ((apart, False), (mixed, True), (apart, False)):
        group.rows.begin(RowTable([Span(1, pairs) for pairs in uses]))
        assert group.group.bound()
        own = group.group.in_place(0)
        assert own is not None
        assert own.is_hidden == is_hidden


@pytest.mark.cpp
@torch.inference_mode()
def test_a_scale_takes_a_product_of_its_own_where_its_row_is_a_mix() -> None:
    programs = {slot: AdapterProgram({"q": (scaled_rotation(SIZES["q"]),)}) for slot in range(2)}
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    group = Group(base, programs, "native")
    for pairs in (((0, 1.0),), ((0, 0.5),), ((0, 1.0), (1, 1.0))):
        group.rows.begin(RowTable([Span(1, ((1, 1.0),)), Span(2, pairs), Span(1)]))
        assert group.group.bound()
        assert (group.group.in_place(0) is not None) == (pairs == ((0, 1.0),))


@pytest.mark.cpp
@torch.inference_mode()
def test_an_adapter_that_was_admitted_in_part_is_admitted_once_when_that_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    makes = (low_rank, gain_on_output)
    programs = {0: AdapterProgram({path: tuple(make(SIZES[path]) for make in makes) for path in PATHS})}
    base = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    table, x_TI = RowTable([Span(2, ((0, 1.0),))]), numbers(2, IN)
    expected = Group(base, programs, "native")(table, x_TI)
    group = Group(base, programs, "native")

    def no_memory(rows: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(group.operators[Diagonal], "standing", no_memory)
        with pytest.raises(MemoryError):
            group(table, x_TI)
    assert all(map(torch.equal, group(table, x_TI), expected))


@pytest.mark.cpp
@torch.inference_mode()
def test_layers_keep_what_they_prepared_of_the_adapters_used_last_alone() -> None:
    model = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    adapted = AdaptedModel(model, [LinearGroup(PATHS)], Arithmetic(kernels="native"))
    count = 3 * MAX_IDLE_OPEN
    for slot in range(count):
        adapted.put(slot, AdapterProgram({path: (low_rank(SIZES[path]),) for path in PATHS}))
        table = RowTable([Span(1, ((slot, 1.0),))])
        adapted.set_rows(table, table)
        model["q"](numbers(1, 1, IN))
        adapted.clear_rows()
    (group,) = adapted._groups
    assert list(group._prepared) == list(range(count - MAX_IDLE_OPEN - 1, count))
    (standing,) = group._standing.by_kind.values()
    assert isinstance(standing, BoundInputKernels)
    assert all(own is not None and len(own.uses._held) == len(group._prepared) for own in standing._kernels)


@pytest.mark.parametrize("kernels", ["torch", pytest.param("native", marks=pytest.mark.cpp)])
@torch.inference_mode()
def test_what_is_prepared_beforehand_is_not_prepared_again_and_kept_of_the_last_alone(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.ModuleDict({path: nn.Linear(IN, size) for path, size in SIZES.items()})
    adapted = AdaptedModel(model, [LinearGroup(PATHS)], Arithmetic(kernels=kernels))
    count = 3 * MAX_IDLE_OPEN
    for slot in range(count):
        own = AdapterProgram({path: (low_rank(SIZES[path]),) for path in PATHS})
        adapted.put(slot, own, adapted.prepared(own))
    (group,) = adapted._groups
    assert list(group._prepared) == list(range(count - MAX_IDLE_OPEN, count))

    asked = []
    prepared = AdaptedGroup.prepared
    monkeypatch.setattr(AdaptedGroup, "prepared", lambda *own: asked.append(own) or prepared(*own))
    for slots, times in (([count - 1, count - 2], 0), ([count - 1, 0], 1)):
        table = RowTable([Span(1, ((slot, 1.0),)) for slot in slots])
        adapted.set_rows(table, table)
        adapted.clear_rows()
        assert len(asked) == times
    adapted.drop(count - 3)
    assert count - 3 not in group._prepared


@pytest.mark.cpp
def test_rows_that_stay_keep_their_lanes_when_others_come_and_go() -> None:
    def seated(slots: list[int], seats: Any) -> Batch:
        return Batch.of(RowTable([Span(1, ((slot, 1.0),)) for slot in slots]), set(slots), 8, seats)

    def lanes(batch: Batch, slots: list[int]) -> dict[int, int]:
        rows = [row for group in batch.groups for row in group.rows]
        return {slots[row]: lane for lane, row in enumerate(rows) if row != NO_ROW}

    first = seated([0, 1, 2, 3, 4], ())
    before = lanes(first, [0, 1, 2, 3, 4])
    second = seated([4, 2, 0, 7], first.seats)
    after = lanes(second, [4, 2, 0, 7])
    assert all(after[slot] == before[slot] for slot in (0, 2, 4))
    assert after[7] in (before[1], before[3])
    third = seated([3, 1, 7], second.seats)
    back = lanes(third, [3, 1, 7])
    assert back[7] == after[7]
    assert {back[1], back[3]} & {before[1], before[3]}
