"""What adapters of low rank add to rows of chunks, which the processor's matrix unit may multiply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.engine.native_linear import NativeProduct
from timbre_server.engine.packed_linear import PackedLinear
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp
IN, OUT = 90, 77
PATH = "layer"
RANKS = [1, 8, 16, 19, 40]
"""By slot."""


def normal(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def low_rank(rank: int, dtype: torch.dtype = torch.bfloat16) -> LowRank:
    return LowRank((normal(rank, IN) / 8).to(dtype), normal(OUT, rank).to(dtype))


def mixture() -> Routed:
    experts = tuple((low_rank(rank),) for rank in (3, 8, 17))
    return Routed(experts, Router(torch.randn(3, IN), Rule(keep="top_k", top_k=2)))


MIXED, NARROW, GAINS = len(RANKS), len(RANKS) + 1, len(RANKS) + 2
"""More slots: of experts, of another format, and of an operator that joins no product."""


class AdaptedLayer:
    def __init__(self, *, has_bias: bool) -> None:
        self.layer = nn.Linear(IN, OUT, bias=has_bias).bfloat16()
        product = PackedLinear(
            self.layer, NativeProduct(self.layer.weight), cast(Tensor | None, self.layer.bias), plain_rows=0
        )
        self.model = nn.ModuleDict({PATH: self.layer})
        arithmetic = Arithmetic(lambda _: product, "native")
        self._adapted = AdaptedModel(self.model, [LinearGroup((PATH,))], arithmetic)

    def put(self, slot: int, part: Part) -> None:
        self._adapted.put(slot, AdapterProgram({PATH: (part,)}))

    @torch.inference_mode()
    def outputs(self, spans: Sequence[Span], xs: Sequence[Tensor]) -> list[Tensor]:
        """Of rows [T, I] of each span."""
        table = RowTable(spans)
        self._adapted.set_rows(table, table)
        y_1TO = self.model[PATH](torch.cat(list(xs))[None])
        self._adapted.clear_rows()
        return list(y_1TO[0].split([span.num_rows for span in spans]))


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def adapted(request: pytest.FixtureRequest) -> AdaptedLayer:
    torch.manual_seed(1)
    found = AdaptedLayer(has_bias=request.param)
    parts: list[Part] = [*map(low_rank, RANKS), mixture(), low_rank(4, torch.float16)]
    for slot, part in enumerate([*parts, Diagonal("output", torch.randn(OUT))]):
        found.put(slot, part)
    return found


def chunk(num_rows: int, *slots: int) -> Span:
    return Span(num_rows, tuple((slot, 0.5 + 0.25 * slot) for slot in slots), in_chunk=True)


CHUNKS = [
    *(chunk(35 + 7 * slot, slot) for slot in range(len(RANKS))),
    chunk(1, 1),
    chunk(20),
    chunk(50, 3, 0),
    chunk(9, 1, NARROW),
    chunk(33, MIXED),
    chunk(12, 4, MIXED),
]
DECODING = [Span(1, ((1, 1.0),)), Span(1), Span(1, ((3, 2.0),)), Span(1, ((MIXED, 1.0),))]
GAINED = [chunk(17, GAINS), chunk(40, 0)]


@pytest.mark.usefixtures("threads")
def test_rows_get_the_same_bits_whatever_rows_are_beside_them(adapted: AdaptedLayer) -> None:
    spans = [*CHUNKS, *DECODING]
    xs = [normal(span.num_rows, IN) for span in spans]
    alone = [adapted.outputs([span], [x])[0] for span, x in zip(spans, xs, strict=True)]
    crowds = [range(len(spans)), range(len(spans) - 1, -1, -1), (0, 11, 1, 12, 5, 5, 13, 7), (10, 9, 14, 2)]
    for crowd in crowds:
        own = [spans[i] for i in crowd]
        for beside in ([], GAINED):  # Sums that no adapter joins.
            others = [normal(span.num_rows, IN) for span in beside]
            found = adapted.outputs([*beside, *own], [*others, *(xs[i] for i in crowd)])[len(beside) :]
            for i, got in zip(crowd, found, strict=True):
                assert torch.equal(got, alone[i]), spans[i]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("span", CHUNKS, ids=lambda span: f"{span.num_rows} of {len(span.pairs)}")
def test_a_chunk_gives_what_its_pieces_give(adapted: AdaptedLayer, span: Span) -> None:
    x_TI = normal(span.num_rows, IN)
    (whole,) = adapted.outputs([span], [x_TI])
    cut = span.num_rows // 3
    sizes = [size for size in (1, cut, span.num_rows - cut - 1) if size > 0]
    xs = x_TI[: sum(sizes)].split(sizes)
    pieces = [adapted.outputs([replace(span, num_rows=len(x))], [x])[0] for x in xs]
    assert torch.equal(torch.cat(pieces), whole[: sum(sizes)])


@pytest.mark.parametrize("slot", range(len(RANKS)))
def test_what_is_added_is_what_the_factors_say(adapted: AdaptedLayer, slot: int) -> None:
    torch.manual_seed(2)
    layer = adapted.layer
    x_TI, other = normal(45, IN), low_rank(RANKS[slot])
    adapted.put(slot, other)
    (base,) = adapted.outputs([chunk(45)], [x_TI])
    (got,) = adapted.outputs([Span(45, ((slot, 0.5),), in_chunk=True)], [x_TI])
    bias = 0 if layer.bias is None else layer.bias.double()
    base_TO = x_TI.double() @ layer.weight.double().T + bias
    want = base_TO + 0.5 * x_TI.double() @ other.a_RI.double().T @ other.b_OR.double().T
    assert not torch.allclose(base.double(), want, rtol=0.1, atol=0.1)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=2**-12)
