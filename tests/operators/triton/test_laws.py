"""What holds for every operator holds for every one in Triton."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from timbre_methods.program import Part
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.contract import Operator
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton import catalogue

KERNELS: Mapping[type[Part], Operator[Any]] = {
    operator.part: operator for operator in all_operators(kernels="triton")
}
NAMES = [type(operator).__name__ for operator in catalogue.operators()] + ["RoutedOperator"]

MAX_ROWS = 5
"""Of a span: the interpreter takes some hundredths of a second for a program."""

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the laws' tensors are on the CPU: for Triton's interpreter"
)


@pytest.fixture(scope="session")
def laws(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """A copy of the laws' module, of other operators."""
    return load_module(Path(__file__).parents[1] / "test_operators.py")


@pytest.fixture(autouse=True)
def _laws_of_kernels(laws: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {type(operator).__name__: operator for operator in KERNELS.values()}
    monkeypatch.setattr(laws, "OPERATORS", own)
    small = {
        crowd: [replace(span, num_rows=min(span.num_rows, MAX_ROWS)) for span in spans]
        for crowd, spans in laws.CROWDS.items()
    }
    monkeypatch.setattr(laws, "CROWDS", small)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("crowd", ["uniform with base rows", "mixes"])
def test_each_row_gets_the_weighted_sum_of_meanings(
    crowd: str, name: str, laws: ModuleType, random_part: Callable[..., Part]
) -> None:
    generator = torch.Generator().manual_seed(len(name))
    table = RowTable(laws.CROWDS[crowd])
    laws.check_against_meaning(laws.OPERATORS[name], table, (15, 9), random_part, generator)


@pytest.mark.parametrize("name", NAMES)
def test_a_bind_copies_nothing_for_each_row(
    name: str, laws: ModuleType, random_part: Callable[..., Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    laws.test_without_room_a_bind_copies_nothing_for_each_row(name, random_part, monkeypatch)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_binding_and_running_modify_neither_parts_nor_input(
    name: str, laws: ModuleType, random_part: Callable[..., Part]
) -> None:
    laws.test_binding_and_running_modify_neither_parts_nor_input(name, random_part)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_that_is_not_finite_spoils_its_own_rows_alone(
    name: str, laws: ModuleType, random_part: Callable[..., Part], parts: ModuleType
) -> None:
    laws.test_a_part_that_is_not_finite_spoils_its_own_rows_alone(name, float("nan"), random_part, parts)
