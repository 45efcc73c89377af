"""ΔW of every additive part against its meaning on the identity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.packed_parts import PackedDense, PackedProjected
from timbre_methods.program import Diagonal, LowRank, Part, Places, Spectral, TokenRows
from timbre_methods.spectral.wavelets import LOW_PASS
from timbre_server.operators import materialise as module
from timbre_server.operators import packed_dense, packed_projected
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.contract import Operator
from timbre_server.operators.dense import DenseOperator
from timbre_server.operators.materialise import is_change_of_weight, materialise
from timbre_server.operators.projected import ProjectedOperator

OPERATORS = all_operators()
ADDITIVE = {
    type(operator).__name__: operator
    for operator in OPERATORS
    if operator.part.__name__ not in {"Diagonal", "Rotation", "Routed"}
}

RandomPart = Callable[[Operator[Any], int, int, torch.Generator], Part]


def in_double(part: Any) -> Any:
    """The same part with its numbers, and those of its basis, in float64."""
    changes: dict[str, Any] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor) and value.is_floating_point():
            changes[field.name] = value.double()
        elif field.name == "basis":
            changes["basis"] = in_double(value)
    return replace(part, **changes)


def by_meaning(operator: Operator[Any], part: Part, shape: tuple[int, int]) -> Tensor:
    """[O, I], computed in float64 where the definition allows it."""
    out_features, in_features = shape
    x_II = torch.eye(in_features, dtype=torch.float64)
    if isinstance(part, PackedProjected):
        operator, part = ProjectedOperator(), packed_projected.unpacked(part)
    if isinstance(part, PackedDense):
        operator, part = DenseOperator(), packed_dense.unpacked(part)
    meaning = operator.meaning(in_double(part), x_II, x_II.new_zeros(in_features, out_features))
    assert meaning.change_TO is not None
    return meaning.change_TO.T


@pytest.mark.parametrize("rows_at_once", [1024, 5])
@pytest.mark.parametrize("shape", [(24, 16), (9, 15), (32, 32)], ids=str)
@pytest.mark.parametrize("name", ADDITIVE)
def test_it_is_what_the_definition_makes_of_the_identity(
    name: str, shape: tuple[int, int], rows_at_once: int, random_part: RandomPart, monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows_at_once)
    operator, generator = ADDITIVE[name], torch.Generator().manual_seed(shape[0] + len(name))
    parts_S = [[random_part(operator, shape[1], shape[0], generator) for _ in range(n)] for n in (1, 0, 2)]

    delta_SOI = materialise(parts_S, shape, OPERATORS)

    assert delta_SOI.dtype == torch.float32
    for delta_OI, parts in zip(delta_SOI, parts_S, strict=True):
        expected = sum((by_meaning(operator, p, shape) for p in parts), torch.zeros(shape).double())
        torch.testing.assert_close(delta_OI.double(), expected, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["dft", "dct", "hartley", "dwt"])
def test_each_transform_is_exact_at_sizes_that_are_no_powers_of_two(name: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    low_pass = LOW_PASS["db2"] if name == "dwt" else ()
    rows, columns = (torch.randint(0, 45, (60,), generator=generator) for _ in range(2))
    part = Spectral(torch.randn(60, generator=generator), Places(name, 45, 63, rows, columns, low_pass))

    delta_OI = materialise([[part]], (45, 63), OPERATORS)[0]

    expected = by_meaning(ADDITIVE["SpectralOperator"], part, (45, 63))
    torch.testing.assert_close(delta_OI.double(), expected, atol=3e-6, rtol=1e-5)


def test_parts_of_several_kinds_add_up(parts: ModuleType, random_part: RandomPart) -> None:
    generator = torch.Generator().manual_seed(8)
    each = [random_part(operator, 16, 24, generator) for operator in ADDITIVE.values()]

    whole = materialise([each], (24, 16), OPERATORS)[0]

    alone = materialise([[part] for part in each], (24, 16), OPERATORS)
    torch.testing.assert_close(whole, alone.sum(0), atol=1e-5, rtol=1e-5)


def test_rows_of_an_embedding_are_columns_of_the_change() -> None:
    part = TokenRows(torch.tensor([1, 4]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))

    delta_OI = materialise([[part]], (2, 6), OPERATORS)[0]

    assert delta_OI.tolist() == [[0, 1, 0, 0, 3, 0], [0, 2, 0, 0, 4, 0]]


def test_what_depends_on_the_base_is_no_change_of_the_weight() -> None:
    assert is_change_of_weight(LowRank(torch.ones(1, 4), torch.ones(4, 1)))
    assert not is_change_of_weight(Diagonal("input", torch.ones(4)))
