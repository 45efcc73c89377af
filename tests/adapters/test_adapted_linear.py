"""What operators in C++ add where they add it: changes that are not computed before others are added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part, Places, Rotation, Spectral
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.operators.catalogue import Kernels
from timbre_server.operators.row_table import RowTable, Span

IN, OUT = 10, 12


def programs() -> list[AdapterProgram]:
    """Gains on both sides, with a shift and without; low rank; a second change of the base's output; a turned
    input, with a scale and without."""
    torch.manual_seed(0)
    gain = Diagonal("output", torch.randn(OUT), None)
    parts: list[tuple[Part, ...]] = [
        (Diagonal("output", torch.randn(OUT), torch.randn(OUT)),),
        (gain, LowRank(torch.randn(3, IN), torch.randn(OUT, 3))),
        (Diagonal("input", torch.randn(IN), None), gain),
        (Rotation("output", torch.randn(2, 3, 4, 4), (OUT, 4)), gain),
        (Rotation("input", torch.randn(1, 5, 2, 2), (2,)), Diagonal("input", torch.randn(IN), None)),
    ]
    parts.append((Rotation("input", torch.randn(1, 5, 2, 2), (2,), torch.randn(OUT)),))
    return [AdapterProgram({"linear": own}) for own in parts]


def output(kernels: Kernels, spans: list[Span], x_1TI: Tensor) -> Tensor:
    torch.manual_seed(1)
    model = nn.ModuleDict({"linear": nn.Linear(IN, OUT).to(x_1TI.dtype)})
    adapted = AdaptedModel(model, [LinearGroup(("linear",))], Arithmetic(kernels=kernels))
    for slot, program in enumerate(programs()):
        adapted.put(slot, program)
    table = RowTable(spans)
    with torch.inference_mode():
        adapted.set_rows(table, table)
        y: Tensor = model["linear"](x_1TI)
        adapted.clear_rows()
    return y


SPANS = {
    "all rows of one": [Span(5, ((0, 1.0),))],
    "gains and low rank": [Span(1, ((1, 1.0),)), Span(2), Span(2, ((0, 0.5), (1, 2.0)))],
    "both sides": [Span(3, ((2, 1.0),)), Span(2, ((0, 1.0), (2, -0.5)))],
    "sides of different rows": [Span(1, ((4, 1.0),)), Span(2, ((0, 1.0),)), Span(2, ((3, 0.3), (1, 2.0)))],
    "two changes of the input": [Span(2, ((4, 1.0),)), Span(3, ((4, 0.5), (2, 0.7), (1, 1.0)))],
    "a scale": [Span(2, ((5, 1.0),)), Span(2, ((1, 1.0),)), Span(1)],
    "scales of mixes": [Span(1, ((5, 1.0),)), Span(2, ((5, 0.5), (4, 0.3))), Span(2, ((5, 1.0), (1, 1.0)))],
    "two changes of the output": [Span(2, ((3, 1.0),)), Span(1), Span(2, ((1, 0.3), (3, 0.7)))],
}


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("crowd", SPANS)
def test_gains_in_cpp_read_the_output_before_anything_is_added(crowd: str, dtype: torch.dtype) -> None:
    x_1TI = torch.randn(1, 5, IN, generator=torch.Generator().manual_seed(2)).to(dtype)
    native, plain = (output(kernels, SPANS[crowd], x_1TI) for kernels in ("native", "torch"))  # type: ignore[arg-type]
    torch.testing.assert_close(native, plain)
    base = output("torch", [Span(5)], x_1TI)
    row = 0
    for span in SPANS[crowd]:
        rows = slice(row, row := row + span.num_rows)
        assert torch.equal(native[0, rows], base[0, rows]) == (not span.pairs)


def outputs_of_group(kernels: Kernels, xs: list[Tensor]) -> list[Tensor]:
    """Of three layers that read one tensor, which holds each of ``xs`` in turn."""
    torch.manual_seed(3)
    paths = ("q", "k", "v")
    model = nn.ModuleDict({path: nn.Linear(IN, OUT) for path in paths})
    adapted = AdaptedModel(model, [LinearGroup(paths)], Arithmetic(kernels=kernels))
    places = Places("dft", OUT, IN, torch.arange(6), torch.arange(6))
    gain = Diagonal("output", torch.randn(OUT), None)
    low_rank = LowRank(torch.randn(3, IN), torch.randn(OUT, 3))
    adapted.put(0, AdapterProgram({"q": (low_rank,), "v": (gain, low_rank)}))
    adapted.put(1, AdapterProgram({path: (Spectral(torch.randn(6), places),) for path in paths}))
    table = RowTable([Span(1, ((0, 1.0),)), Span(2, ((1, 0.5),)), Span(1), Span(1, ((0, 0.3), (1, 0.7)))])
    x_1TI, found = torch.empty_like(xs[0]), []
    with torch.inference_mode():
        for each in xs:
            x_1TI.copy_(each)
            adapted.set_rows(table, table)
            found += [model[path](x_1TI) for path in paths]
            adapted.clear_rows()
    return found


@pytest.mark.cpp
def test_members_of_a_group_share_what_is_made_of_their_input_and_of_no_other() -> None:
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(1, 5, IN, generator=generator) for _ in range(2)]
    native, plain = (outputs_of_group(kernels, xs) for kernels in ("native", "torch"))  # type: ignore[arg-type]
    for got, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
